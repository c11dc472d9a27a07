"""A block: mixers one after another, each with a norm before it. A feed-forward is a mixer like any other."""

from __future__ import annotations

from torch import nn

from slipstream.core.mixer import Mixer
from slipstream.layers.norm import RMSNorm


class Block(nn.Module):
    """The parameters of one element of the pattern; the stack runs them."""

    def __init__(self, mixers: list[Mixer], d_model: int, eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(d_model, eps) for _ in mixers)
        self.mixers = nn.ModuleList(mixers)
