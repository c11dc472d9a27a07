r"""Causal convolution along time: depthwise (short convolutions) and dense with dilation (temporal convolutions).

    depthwise  y_t = sum_{i<W} w_i * x_{t-W+1+i} + bias         dense  y_t = sum_{i<W} M_i x_{t-dilation (W-1-i)} + bias

The state is the last (W-1) * dilation inputs. Depthwise taps are summed one by one, dense taps are laid side by side
for one product with the weight as it is stored: on a CPU both beat a library convolution for the few taps used here, by
far for one token, and need no other layout than B T D. Long convolutions are another op.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.ops.dispatch import operator
from slipstream.ops.valid import last_tokens, zero_padding


@operator("x")
def causal_conv(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, "D"] | None = None,
    state: Float[Tensor, "B P D"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    activation: bool = False,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B P D"]]:
    """Depthwise; the last column of weight meets the current token. state: the W-1 inputs before x (None: zeros).

    activation: silu(y), as short convolutions have it.
    """
    T, past = x.shape[1], weight.shape[1] - 1
    line = _with_past(zero_padding(x, lengths), state, past)
    y = line[:, past:] * weight[:, past]
    for i in range(past):
        y = torch.addcmul(y, line[:, i : i + T], weight[:, i])
    y = y if bias is None else y + bias
    return (F.silu(y) if activation else y), last_tokens(line, past, lengths)


@operator("x")
def dilated_conv(
    x: Float[Tensor, "B T I"],
    weight: Float[Tensor, "O I W"],
    bias: Float[Tensor, "O"] | None = None,
    state: Float[Tensor, "B P I"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    dilation: int = 1,
) -> tuple[Float[Tensor, "B T O"], Float[Tensor, "B P I"]]:
    """Dense, with dilation. state: the (W-1) * dilation inputs before x (zeros when None)."""
    T, past = x.shape[1], (weight.shape[2] - 1) * dilation
    line = _with_past(zero_padding(x, lengths), state, past)
    taps = torch.stack([line[:, i * dilation : i * dilation + T] for i in range(weight.shape[2])], -1)
    return F.linear(taps.flatten(2), weight.flatten(1), bias), last_tokens(line, past, lengths)


def dilated_conv_flops(tokens: int, d_in: int, d_out: int, conv_size: int) -> float:
    """Flops of a dense convolution over so many tokens; a depthwise one has no matrix product."""
    return 2.0 * tokens * conv_size * d_in * d_out


def _with_past(x: Tensor, state: Tensor | None, past: int) -> Tensor:
    if state is None:
        return F.pad(x, (0, 0, past, 0))
    return torch.cat([state.to(x.dtype), x], 1)


def reference(
    x: Float[Tensor, "B T I"], weight: Float[Tensor, "O I W"], bias: Float[Tensor, "O"] | None = None, dilation: int = 1
) -> Float[Tensor, "B T O"]:
    """The definition, token by token; depthwise is the dense form with a diagonal weight."""
    ys = []
    for t in range(x.shape[1]):
        y = x.new_zeros(x.shape[0], weight.shape[0]) + (0.0 if bias is None else bias)
        for i in range(weight.shape[2]):
            s = t - dilation * (weight.shape[2] - 1 - i)
            if s >= 0:
                y = y + torch.einsum("oi,bi->bo", weight[:, :, i], x[:, s])
        ys.append(y)
    return torch.stack(ys, 1) if ys else x.new_zeros(x.shape[0], 0, weight.shape[0])
