r"""Convolution along time with a filter as long as the past: by fast Fourier transforms, or for one token by its definition.

    y_t = sum_{s<=t} taps_{t-s} u_s          one filter a channel

A filter without a recurrence behind it has no state of fixed size: all inputs must be kept, and each token reads them all.
Many tokens together cost O(S log S), S being the past and the new; what follows a row's own tokens must be finite, and
is not seen. Computed in float32 at least.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def long_conv(
    u: Float[Tensor, "B S D"],
    taps: Float[Tensor, "S D"],
    past: Int[Tensor, "B"] | None = None,
    tokens: int | None = None,
) -> Float[Tensor, "B T D"]:
    """Outputs at positions past_b, past_b + 1, ..., so many as tokens; of the whole line by default. In u's dtype."""
    wide, size = torch.promote_types(u.dtype, torch.float32), transform_size(u.shape[1])
    spectrum = torch.fft.rfft(u.to(wide), size, 1) * torch.fft.rfft(taps.to(wide), size, 0)
    y = torch.fft.irfft(spectrum, size, 1)[:, : u.shape[1]].to(u.dtype)
    if past is None or tokens is None:
        return y
    index = past[:, None] + torch.arange(tokens, device=u.device)
    return torch.gather(y, 1, index[..., None].expand(-1, -1, u.shape[2]))


def long_conv_step(
    u: Float[Tensor, "B S D"], taps: Float[Tensor, "S D"], position: Int[Tensor, "B"]
) -> Float[Tensor, "B D"]:
    """The output at one position of each row."""
    ago = position[:, None] - torch.arange(u.shape[1], device=u.device)
    seen = torch.where((ago >= 0)[..., None], taps[ago.clamp(min=0)], 0.0)
    return torch.einsum("bsd,bsd->bd", seen, u.to(taps.dtype)).to(u.dtype)


def transform_size(length: int) -> int:
    """A power of two at which no output wraps around to the start."""
    return 1 << (2 * length - 1).bit_length() if length else 1


def long_conv_flops(length: int, rows: int, width: int) -> float:
    """Flops of the transforms, n log2 n 5/2 for each real one of n numbers: inputs, outputs, and taps, which rows share."""
    n = transform_size(length)
    return (2 * rows + 1) * width * 2.5 * n * math.log2(n)


def reference(u: Float[Tensor, "B T D"], taps: Float[Tensor, "T D"]) -> Float[Tensor, "B T D"]:
    """The definition, token by token."""
    ys = [torch.einsum("bsd,sd->bd", u[:, : t + 1], taps[: t + 1].flip(0)) for t in range(u.shape[1])]
    return torch.stack(ys, 1) if ys else u
