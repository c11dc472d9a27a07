"""The norms a residual stream can have, by name: what model families differ in.

rms             x / rms(x) * w
rms_plus_one    x / rms(x) * (1 + w)               weights kept less one (Gemma)
layer           (x - mean(x)) / std(x) * w + b
layer_no_bias   (x - mean(x)) / std(x) * w
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slipstream.layers.norm import RMSNorm
from slipstream.ops.rms_norm import rms_norm

Norm = Literal["rms", "rms_plus_one", "layer", "layer_no_bias"]


class PlusOneRMSNorm(nn.Module):
    """Its weight is what is added to one: weight decay pulls it to 1, and small weights keep their digits."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(wide), 1 + self.weight.to(wide), self.eps).to(x.dtype)


def stream_norm(kind: Norm, width: int, eps: float) -> nn.Module:
    """A norm by its name."""
    if kind == "rms":
        return RMSNorm(width, eps)
    if kind == "rms_plus_one":
        return PlusOneRMSNorm(width, eps)
    return nn.LayerNorm(width, eps, bias=kind == "layer")
