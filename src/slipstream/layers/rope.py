"""Rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34): q and k turned by angles that grow with the position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.layers.rope_scaling import RopeScaling
from slipstream.ops.rotate import rotate


def rope(
    x: Float[Tensor, "B T H K"],
    positions: Int[Tensor, "B T"],
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
) -> Float[Tensor, "B T H K"]:
    """Rotate pairs (i, i + K/2) by positions * base^(-2i/K), or as scaling says: the half-split layout of Hugging Face.

    Angles are computed in float32 at least; K must be even. A scaling's magnitude is for whoever places q and k.
    """
    return partial_rope(x, positions, base, 1.0, scaling)


def partial_rope(
    x: Float[Tensor, "B T H K"],
    positions: Int[Tensor, "B T"],
    base: float = 10000.0,
    fraction: float = 1.0,
    scaling: RopeScaling | None = None,
) -> Float[Tensor, "B T H K"]:
    """The first part of the channels turned (GPT-NeoX, Qwen3-Next), the others as they are. An even number of them turns."""
    return rotate(x, *turns(positions, int(fraction * x.shape[-1]), base, scaling, x.dtype))


def turns(
    positions: Int[Tensor, "B T"], width: int, base: float, scaling: RopeScaling | None, dtype: torch.dtype
) -> tuple[Float[Tensor, "B T P"], Float[Tensor, "B T P"]]:
    """Cosines and sines of the angles that `width` channels turn by, in float32 at least: for all that stands there."""
    half, wide = width // 2, torch.promote_types(dtype, torch.float32)
    if scaling is None:
        inverse = base ** -(torch.arange(half, device=positions.device, dtype=wide) / half)
    else:
        inverse = torch.tensor(scaling.angles(base, 2 * half), device=positions.device, dtype=wide)
    angle = positions[..., None].to(wide) * inverse
    return angle.cos(), angle.sin()
