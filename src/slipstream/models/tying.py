"""One set of weights for several layers: they have the same modules and parameters, and each its own state."""

from __future__ import annotations

from typing import cast

from torch import nn

from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer
from slipstream.models.block import Block


def tie(blocks: nn.ModuleList, at: str, owner: str) -> None:
    """The mixer at a place ("block.mixer") and its norms get the weights of another, but for what its class leaves untied.

    Raises InputError for a mixture of experts, whose balance is each layer's own.
    """
    (mine, i), (its, j) = (_found(blocks, place) for place in (at, owner))
    mine.norms[i], mine.out_norms[i] = its.norms[j], its.out_norms[j]
    _give(cast(Mixer, its.mixers[j]), cast(Mixer, mine.mixers[i]))


def _found(blocks: nn.ModuleList, place: str) -> tuple[Block, int]:
    block, _, mixer = place.partition(".")
    return cast(Block, blocks[int(block)]), int(mixer)


def _give(owner: Mixer, mixer: Mixer) -> None:
    if owner.idle_parameters():
        raise InputError(f"{owner.name} has experts, which layers cannot share: leave out tied")
    for kind in ("_modules", "_parameters", "_buffers"):
        shared = {name: part for name, part in getattr(owner, kind).items() if name not in owner.untied}
        getattr(mixer, kind).update(shared)
