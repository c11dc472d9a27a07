"""Which layers take something from an earlier one: its keys and values, its weights. Read without torch.

Cross-layer attention (CLA, Brandon et al. 2024, arXiv:2405.12981) lets neighbouring attention layers share one cache: of
every share_kv layers of a kind, the first makes and keeps keys and values, and the others have queries alone.
YOCO (Sun et al. 2024, arXiv:2405.05254) makes them once: "4*sliding_window, 4*attention" with share_kv=4 is a lower half
that remembers little and an upper half that reads one cache. What is between the layers that share does not matter. Windows
are left alone by share_kv, since they hold little; a pattern may have them shared (Gemma 3n).

Value residuals (Zhou et al. 2024, arXiv:2410.17897; RWKV-7, arXiv:2503.14456, sec. 4) leave each layer its own values, and
mix in those that the first layer made of the same token.

A mixer whose settings have `own_kv` or `value_residual` can do this. A pattern may say it itself:
"attention, attention(own_kv=false)". Whatever the mixer, layers with one number of `tied` have one set of weights, as in
ALBERT (Lan et al. 2019, arXiv:1909.11942), and each its own memory: "3*mamba2, attention(tied=0)".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from slipstream.core.cards import cards
from slipstream.core.errors import InputError
from slipstream.models.pattern import BlockSpec, Part

BORROWING: dict[str, Any] = {"own_kv": False, "value_residual": True}  # the settings of who needs what another has
Kind = tuple[str, ...]


def with_shared(blocks: list[BlockSpec], share_kv: int, value_residual: bool = False) -> list[BlockSpec]:
    """Of every share_kv layers of a kind (a name and its settings), all but the first without keys and values of their own;
    with value_residual, all but the first of all mix in its values.

    Layers for which the pattern says it itself are left alone. Raises InputError when nothing can be shared.
    """
    if share_kv > 1:
        blocks = _borrowing(blocks, "own_kv", share_kv, f"share_kv {share_kv}")
    return _borrowing(blocks, "value_residual", 1 << 30, "value_residual true") if value_residual else blocks


def _borrowing(blocks: list[BlockSpec], field: str, every: int, asked: str) -> list[BlockSpec]:
    """In every so many layers of a kind that can, all but the first borrow."""
    seen: Counter[Kind] = Counter()
    able = [name for name, c in cards().items() if field in c.fields and (field != "own_kv" or c.grows)]

    def shared(part: Part) -> Part:
        if part.name not in able or field in part.settings:
            return part
        before = seen[_kind(part)]
        seen[_kind(part)] += 1
        return replace(part, settings=part.settings | {field: BORROWING[field]}) if before % every else part

    new = [BlockSpec(tuple(map(shared, block.parts))) for block in blocks]
    if new == blocks:
        raise InputError(f"{asked} needs two layers with equal settings of a mixer that can share: {', '.join(able)}")
    return new


def lenders(blocks: list[BlockSpec]) -> dict[str, str]:
    """Whose layer lends to which: place -> place, "block.mixer". The last before it, of its kind, that borrows nothing: keys
    are as their own layer made them, so that who reads them must have its heads and positions.

    Raises InputError when there is none.
    """
    found: dict[str, str] = {}
    last: dict[Kind, str] = {}
    for place, part in placed(blocks):
        field = next((n for n, value in BORROWING.items() if part.settings.get(n) is value), None)
        if field is None:
            last[_kind(part)] = place
        elif _kind(part) in last:
            found[place] = last[_kind(part)]
        else:
            raise InputError(
                f"{part.name}({field}={str(BORROWING[field]).lower()}) in block {place.partition('.')[0]} has no {part.name} "
                "before it, with equal settings, to read from"
            )
    return found


def owners(blocks: list[BlockSpec]) -> dict[str, str]:
    """Whose weights a layer has: place -> place of the first that is tied by its number.

    Raises InputError when their settings differ.
    """
    first: dict[tuple[str, int], tuple[str, Part]] = {}
    found: dict[str, str] = {}
    for place, part in placed(blocks):
        if part.tied is None:
            continue
        owner, its = first.setdefault((part.name, part.tied), (place, part))
        if its != part:
            raise InputError(
                f"layers of {part.name} with tied={part.tied} have one set of weights: give them equal settings"
            )
        if owner != place:
            found[place] = owner
    return found


def placed(blocks: list[BlockSpec]) -> Iterator[tuple[str, Part]]:
    """Every part with its place, "block.mixer"."""
    for i, block in enumerate(blocks):
        for j, part in enumerate(block.parts):
            yield f"{i}.{j}", part


def _kind(part: Part) -> Kind:
    return part.name, *sorted(f"{k}={v}" for k, v in part.settings.items() if k not in BORROWING)
