r"""A norm of each token or head by its root mean square, with a gate where the layer has one.

    y = x / sqrt(mean(x^2) + eps) * weight                                     Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4
    y = x / sqrt(mean(x^2) + eps) * weight * silu(gate), or of x * silu(gate)  the output norm of gated linear mixers

Computed in float32 at least, in x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from slipstream.ops.dispatch import operator


@operator("x", "gate")
def rms_norm(
    x: Float[Tensor, "*A D"],
    weight: Float[Tensor, "D"] | None = None,
    eps: float = 1e-6,
    gate: Float[Tensor, "*A D"] | None = None,
    gate_first: bool = False,
) -> Float[Tensor, "*A D"]:
    """gate_first: the gate comes before the norm, as in Mamba-2, and not after it."""
    if gate is not None and gate_first:
        x = x * F.silu(gate)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    y = y if weight is None else y * weight
    return y if gate is None or gate_first else y * F.silu(gate)


def reference(
    x: Float[Tensor, "*A D"],
    weight: Float[Tensor, "D"] | None = None,
    eps: float = 1e-6,
    gate: Float[Tensor, "*A D"] | None = None,
    gate_first: bool = False,
) -> Float[Tensor, "*A D"]:
    """Row by row."""
    weight = torch.ones_like(x[..., 0, :].flatten()[: x.shape[-1]]) if weight is None else weight
    after = torch.ones_like(x) if gate is None else gate / (1 + torch.exp(-gate))
    rows = []
    for row, factor in zip(x.reshape(-1, x.shape[-1]), after.reshape(-1, x.shape[-1])):
        row, factor = (row * factor, torch.ones_like(factor)) if gate_first else (row, factor)
        rows.append(row / torch.sqrt((row * row).sum() / len(row) + eps) * weight * factor)
    return torch.stack(rows).view_as(x)
