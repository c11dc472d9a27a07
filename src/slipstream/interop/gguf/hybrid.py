"""Models of which only some layers have attention: the others are said to have no heads of keys."""

from __future__ import annotations

from slipstream.core.errors import InputError
from slipstream.interop.hf.fields import Fields

KV = "attention.head_count_kv"  # one number a layer


def attention_places(said: Fields) -> tuple[Fields, list[bool]]:
    """The same settings with one number of heads for all layers, and which of them have attention."""
    counts = said.wholes(KV)
    if not counts or len(set(counts) - {0}) != 1:
        raise InputError(f"{said.owner}: {KV} must be zeros, and one number for layers with attention")
    if len(counts) != said.whole("block_count"):
        raise InputError(f"{said.owner}: {KV} are {len(counts)} numbers for {said.whole('block_count')} layers")
    alike = Fields(said.table | {KV: max(counts)}, said.owner)
    alike.asked = said.asked  # what is asked of one is asked of both
    return alike, [n > 0 for n in counts]


def their_places(places: list[bool], count: int) -> dict[str, list[int]]:
    """The inverse."""
    return {KV: [count * here for here in places]}
