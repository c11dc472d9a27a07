"""Norms: of the residual stream, per head, and with an output gate."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slipstream.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4), computed in float32 at least."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """rms_norm(x) * weight * act(gate), over the last axis: the output norm of gated linear mixers.

    gate_first applies the gate before the norm, as Mamba-2 does.
    """

    def __init__(self, width: int, eps: float = 1e-6, gate_first: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.gate_first = eps, gate_first

    def forward(self, x: Float[Tensor, "... D"], gate: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return rms_norm(x, self.weight, self.eps, gate, self.gate_first)
