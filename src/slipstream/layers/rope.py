"""Rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34): q and k turned by angles that grow with the position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.layers.rope_scaling import RopeScaling


def rope(
    x: Float[Tensor, "B T H K"],
    positions: Int[Tensor, "B T"],
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
) -> Float[Tensor, "B T H K"]:
    """Rotate pairs (i, i + K/2) by positions * base^(-2i/K), or as scaling says: the half-split layout of Hugging Face.

    Angles are computed in float32 at least; K must be even. A scaling's magnitude is for whoever places q and k.
    """
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    if scaling is None:
        inverse = base ** -(torch.arange(half, device=x.device, dtype=wide) / half)
    else:
        inverse = torch.tensor(scaling.angles(base, 2 * half), device=x.device, dtype=wide)
    angle = positions[..., None, None].to(wide) * inverse
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def partial_rope(
    x: Float[Tensor, "B T H K"],
    positions: Int[Tensor, "B T"],
    base: float = 10000.0,
    fraction: float = 1.0,
    scaling: RopeScaling | None = None,
) -> Float[Tensor, "B T H K"]:
    """The first part of the channels turned (GPT-NeoX, Qwen3-Next), the others as they are. An even number of them turns."""
    if (turned := int(fraction * x.shape[-1])) == x.shape[-1]:
        return rope(x, positions, base, scaling)
    return torch.cat([rope(x[..., :turned], positions, base, scaling), x[..., turned:]], -1)
