"""Quantised matrices of a file as the matrices of a QuantisedLinear: 8 bits a weight, one scale for 32.

Blocks of codes with one scale for 32 weights (Q8_0, Q5_0, Q4_0) are taken as they are. Those with minima or with scales for fewer
weights (Q4_1, Q5_1, all K) can be rounded to such codes. The error is 0.5 % of the weights, which is not nothing: it has turned
an answer of SmolLM2 135M where two words were nearly as likely. So that is done only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.interop.gguf.blocks import PLAIN, WHOLE, whole_codes
from slipstream.interop.gguf.container import GGUF
from slipstream.interop.hf.weights import Change
from slipstream.models.config import Quantisation
from slipstream.models.quantisation import FEWEST
from slipstream.ops.quantised_linear import TILE, Codes, Scales, pack, tiled

HOW = Quantisation(to="int8", group=32)


def are_exact(file: GGUF) -> bool:
    """Whether every matrix that a quantised model keeps in few bits is in blocks that it can keep as they are."""
    large = [t.kind.name for t in file.tensors.values() if len(t.shape) > 1 and min(t.shape) >= FEWEST]
    return bool(large) and set(large) <= set(WHOLE)


def kinds_of_blocks(file: GGUF) -> str:
    return ", ".join(sorted({t.kind.name for t in file.tensors.values()} - set(PLAIN)))


def as_they_are(file: GGUF, name: str, change: Change) -> tuple[Codes, Scales] | None:
    """The matrix of this name without loss; None when its blocks are of another kind. change: of the order of its rows."""
    stored = file.tensors[name]
    if stored.kind.name not in WHOLE:
        return None
    codes, scales = whole_codes(stored.kind, file.raw(name).view(-1, stored.kind.bytes))
    by_row = [t.reshape(stored.shape[0], -1) for t in (codes, scales)]
    if stored.kind.name == "Q8_0" and by_row[0].numpy().min() < -127:
        return None  # which no quantiser writes, and the kernel does not know
    codes, scales = (_whole_tiles(change([t])[0]) for t in by_row)
    return tiled(codes, scales)


def _whole_tiles(rows: Tensor) -> Tensor:
    short = -len(rows) % TILE
    return F.pad(rows, (0, 0, 0, short)) if short else rows


def named(name: str, packed: tuple[Codes, Scales], wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Under the names that a quantised model has for a weight, or for the matrix that an embedding looks its rows up in."""
    module = name.removesuffix(".weight")
    module = module if f"{module}.codes" in wanted else f"{module}.matrix"
    yield from zip((f"{module}.codes", f"{module}.scales"), packed)


def rounded(weight: Tensor) -> tuple[Codes, Scales]:
    return pack(weight, HOW.bits, HOW.group)


def settle(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """What comes in and goes out of quantised matrices has this dtype."""
    for module in model.modules():
        if "like" in module._buffers:
            module._buffers["like"] = torch.empty(0, dtype=dtype)
