r"""Pairs of numbers turned by angles: what rotary positions do to queries and keys.

    y_i = x_i cos(a_i) - x_{i+P} sin(a_i)        y_{i+P} = x_{i+P} cos(a_i) + x_i sin(a_i)        i < P

The first 2P channels of a head turn, in the half-split layout of Hugging Face; the others stay. Su et al. 2021,
arXiv:2104.09864, eq. 34. Which angles a position has is for layers/rope.py to say.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from slipstream.ops.dispatch import operator


@operator()
def rotate(
    x: Float[Tensor, "B T H K"], cos: Float[Tensor, "B T P"], sin: Float[Tensor, "B T P"]
) -> Float[Tensor, "B T H K"]:
    """All heads of a token turn alike. No gradients of the angles."""
    pairs = cos.shape[2]
    a, b, rest = x.split([pairs, pairs, x.shape[3] - 2 * pairs], -1)
    cos, sin = (angle.detach().to(x.dtype)[:, :, None] for angle in (cos, sin))
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def reference(
    x: Float[Tensor, "B T H K"], cos: Float[Tensor, "B T P"], sin: Float[Tensor, "B T P"]
) -> Float[Tensor, "B T H K"]:
    """Pair by pair."""
    channels, pairs = list(x.unbind(-1)), cos.shape[2]
    for i in range(pairs):
        a, b, c, s = x[..., i], x[..., pairs + i], cos[:, :, None, i], sin[:, :, None, i]
        channels[i], channels[pairs + i] = a * c - b * s, b * c + a * s
    return torch.stack(channels, -1)
