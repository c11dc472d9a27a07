"""Norms: of the residual stream, per head, and with an output gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4), computed in float32 at least."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return rms_norm(x, self.eps) * self.weight


class GatedRMSNorm(nn.Module):
    """rms_norm(x) * weight * act(gate), over the last axis: the output norm of gated linear mixers.

    gate_first applies the gate before the norm, as Mamba-2 does.
    """

    def __init__(self, width: int, eps: float = 1e-6, gate_first: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.gate_first = eps, gate_first

    def forward(self, x: Float[Tensor, "... D"], gate: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        if self.gate_first:
            return rms_norm(x * F.silu(gate), self.eps) * self.weight
        return rms_norm(x, self.eps) * self.weight * F.silu(gate)


def rms_norm(x: Float[Tensor, "... D"], eps: float = 1e-6) -> Float[Tensor, "... D"]:
    """x / sqrt(mean(x^2) + eps), computed in float32 at least, in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def l2_norm(x: Float[Tensor, "... D"], eps: float = 1e-6) -> Float[Tensor, "... D"]:
    """x / sqrt(sum(x^2) + eps): unit keys, with a gradient at zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
