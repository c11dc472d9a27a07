"""A block: mixers one after another, each with a norm before it, after it, or both. A feed-forward is a mixer like any other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from slipstream.core.mixer import Mixer
from slipstream.layers.stream_norm import stream_norm
from slipstream.models.config import Wiring


class Block(nn.Module):
    """The parameters of one element of the pattern; the stack runs them. reads: how wide what each mixer reads is."""

    def __init__(self, mixers: list[Mixer], reads: Sequence[int], d_model: int, eps: float, wiring: Wiring) -> None:
        super().__init__()

        place: str = wiring.norm_place
        if place == "after_attention":
            place = "after" if mixers[0].family == "attention" else "before"

        def norms(widths: Sequence[int], *places: str) -> nn.ModuleList:
            there = place in places
            return nn.ModuleList(stream_norm(wiring.norm, width, eps) if there else nn.Identity() for width in widths)

        self.norms = norms(reads, "before", "around", "stream")
        self.mixers = nn.ModuleList(mixers)
        self.out_norms = norms([d_model] * len(mixers), "after", "around")
