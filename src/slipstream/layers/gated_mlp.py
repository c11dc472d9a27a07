"""A gated feed-forward as a part of others (Shazeer 2020, arXiv:2002.05202), and how wide one is by default."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from slipstream.layers.linear import Linear
from slipstream.ops.silu_gate import silu_gate


class GatedMLP(nn.Module):
    """The same network for every token, as shared experts are: one of their widths together."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (Linear(d_model, d_ff, bias=False) for _ in range(2))
        self.down_proj = Linear(d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*A D"]) -> Float[Tensor, "*A D"]:
        return self.down_proj(silu_gate(self.up_proj(x), self.gate_proj(x)))


def gated_width(d_model: int) -> int:
    """8/3 d_model, rounded up to a multiple of 16: with three matrices as many parameters as 4 d_model with two."""
    return -(-d_model * 8 // 48) * 16
