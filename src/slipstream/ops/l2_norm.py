r"""Unit length: what keys and queries are given before a rule that would otherwise grow with them.

    y = x / sqrt(sum(x^2) + eps)

Computed in float32 at least, in x's dtype; it has a gradient at zero.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from slipstream.ops.dispatch import operator


@operator("x")
def l2_norm(x: Float[Tensor, "*A D"], eps: float = 1e-6) -> Float[Tensor, "*A D"]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def reference(x: Float[Tensor, "*A D"], eps: float = 1e-6) -> Float[Tensor, "*A D"]:
    """Row by row."""
    rows = [row / torch.sqrt((row * row).sum() + eps) for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).view_as(x)
