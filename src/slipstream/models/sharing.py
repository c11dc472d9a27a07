"""Which layers read the keys and values of an earlier layer and have none of their own. Read without torch.

Cross-layer attention (CLA, Brandon et al. 2024, arXiv:2405.12981) lets neighbouring attention layers share one cache: of
every share_kv layers of a kind, the first makes and keeps keys and values, and the others have queries alone.
YOCO (Sun et al. 2024, arXiv:2405.05254) makes them once: "4*sliding_window, 4*attention" with share_kv=4 is a lower half
that remembers little and an upper half that reads one cache. What is between the layers that share does not matter.

A mixer whose settings have `own_kv` can do either. A pattern may say it itself: "attention, attention(own_kv=false)".
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from slipstream.core.cards import card, cards
from slipstream.core.errors import InputError
from slipstream.models.pattern import BlockSpec, Part

FIELD = "own_kv"
Kind = tuple[str, ...]


def with_shared(blocks: list[BlockSpec], share_kv: int) -> list[BlockSpec]:
    """Of every share_kv layers of a kind (a name and its settings), all but the first without keys and values of their own.

    Layers for which the pattern says it itself are left alone. Raises InputError when nothing can be shared.
    """
    seen: Counter[Kind] = Counter()

    def shared(part: Part) -> Part:
        if FIELD not in card(part.name).fields or FIELD in part.settings:
            return part
        before = seen[_kind(part)]
        seen[_kind(part)] += 1
        return replace(part, settings=part.settings | {FIELD: False}) if before % share_kv else part

    new = [BlockSpec(tuple(map(shared, block.parts))) for block in blocks]
    if share_kv > 1 and new == blocks:
        able = ", ".join(name for name, c in cards().items() if FIELD in c.fields)
        raise InputError(f"share_kv {share_kv} needs two layers with equal settings of a mixer that can share: {able}")
    return new


def lenders(blocks: list[BlockSpec]) -> dict[str, str]:
    """Whose keys and values a layer reads: place -> place, "block.mixer". The last before it, of its kind, that has its own:
    keys are as their own layer made them, so that who reads them must have its heads and positions.

    Raises InputError when there is none.
    """
    found: dict[str, str] = {}
    last: dict[Kind, str] = {}
    for i, block in enumerate(blocks):
        for j, part in enumerate(block.parts):
            place, kind = f"{i}.{j}", _kind(part)
            if part.settings.get(FIELD, True):
                last[kind] = place
            elif kind in last:
                found[place] = last[kind]
            else:
                raise InputError(
                    f"{part.name}({FIELD}=false) in block {i} has no {part.name} before it, with equal settings, to read from"
                )
    return found


def _kind(part: Part) -> Kind:
    return part.name, *sorted(f"{k}={v}" for k, v in part.settings.items() if k != FIELD)
