"""A block: mixers one after another, each with a norm before it, after it, or both. A feed-forward is a mixer like any other."""

from __future__ import annotations

from torch import nn

from slipstream.core.mixer import Mixer
from slipstream.layers.stream_norm import stream_norm
from slipstream.models.config import Wiring


class Block(nn.Module):
    """The parameters of one element of the pattern; the stack runs them."""

    def __init__(self, mixers: list[Mixer], d_model: int, eps: float, wiring: Wiring) -> None:
        super().__init__()

        place: str = wiring.norm_place
        if place == "after_attention":
            place = "after" if mixers[0].family == "attention" else "before"

        def norms(*places: str) -> nn.ModuleList:
            there = place in places
            return nn.ModuleList(stream_norm(wiring.norm, d_model, eps) if there else nn.Identity() for _ in mixers)

        self.norms = norms("before", "around", "stream")
        self.mixers = nn.ModuleList(mixers)
        self.out_norms = norms("after", "around")
