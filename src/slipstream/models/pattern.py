"""The pattern string: which mixers, in which order, with which settings. Read without torch.

"3*gated_deltanet, attention"                three blocks of one, one of the other, repeated to n_layers
"attention(n_kv_heads=1, window=none)/mlp"   settings in brackets, the feed-forward behind the slash (default swiglu)
"mamba/none"                                 no feed-forward
"attention(tied=0)"                          layers with one number have one set of weights, each its own memory
"attention(to_next=true)/mamba"              what it says is read by the next mixer, beside the stream, and not added to that
"jamba"                                      the pattern of a preset (see presets/)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import yaml

from slipstream.core.cards import card
from slipstream.core.errors import InputError, nearest
from slipstream.models.presets import expanded

ELEMENT = re.compile(
    r"\s*(?:(\d+)\s*\*)?\s*([a-z_]\w*)\s*(?:\(([^()]*)\))?\s*(?:/\s*([a-z_]\w*)\s*(?:\(([^()]*)\))?)?\s*", re.I
)
DEFAULT_FEEDFORWARD = "swiglu"


PLACING = {"tied": int, "to_next": bool}  # settings of any mixer's place, which it knows nothing of itself


@dataclass(frozen=True)
class Part:
    """One mixer by name, with its settings. tied: those with one number have one set of weights. to_next: what it says is
    for the next mixer alone, which reads it beside the stream."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    tied: int | None = None
    to_next: bool = False


@dataclass(frozen=True)
class BlockSpec:
    """The mixers of one block, in order: usually a sequence mixer and a feed-forward."""

    parts: tuple[Part, ...]


def parse(pattern: str) -> list[BlockSpec]:
    """The blocks of one period. Raises InputError for a malformed element, an unknown mixer or an unknown setting."""
    blocks: list[BlockSpec] = []
    for element in _split(expanded(pattern)):
        match = ELEMENT.fullmatch(element)
        if not match:
            raise InputError(
                f"cannot read {element.strip()!r} in pattern {pattern!r}; write [count*]mixer[(key=value)][/feedforward]"
            )
        count, name, settings, feedforward, ff_settings = match.groups()
        if count == "0":
            raise InputError(f"{element.strip()!r} in pattern {pattern!r} asks for 0 blocks; count from 1")
        parts = [_part(name, settings, pattern)]
        if feedforward != "none":
            parts.append(_part(feedforward or DEFAULT_FEEDFORWARD, ff_settings, pattern))
        blocks += [BlockSpec(tuple(parts))] * int(count or 1)
    return blocks


def layers(pattern: str, n_layers: int) -> list[BlockSpec]:
    """The period repeated to n_layers blocks. Raises InputError when it does not come out even with at least one period."""
    period = parse(pattern)
    if n_layers < len(period):
        raise InputError(f"pattern {pattern!r} is {len(period)} blocks long; n_layers {n_layers} must be at least that")
    return [period[i % len(period)] for i in range(n_layers)]


def written(blocks: list[BlockSpec]) -> str:
    """The pattern that is read as these blocks: the inverse of parse."""
    runs = ((element, len(list(same))) for element, same in groupby(map(_element, blocks)))
    return ", ".join(f"{n}*{element}" if n > 1 else element for element, n in runs)


def period(blocks: list[BlockSpec]) -> list[BlockSpec]:
    """The fewest first blocks that give all, when repeated."""
    sizes = range(1, len(blocks) + 1)
    n = next(n for n in sizes if all(block == blocks[i % n] for i, block in enumerate(blocks)))
    return blocks[:n]


def _element(block: BlockSpec) -> str:
    first, *rest = block.parts
    behind = "".join("/" + _name(part) for part in rest if part != Part(DEFAULT_FEEDFORWARD)) if rest else "/none"
    return _name(first) + behind


def _name(part: Part) -> str:
    placing = {key: getattr(part, key) for key in PLACING if getattr(part, key) != getattr(Part, key)}
    settings = ", ".join(f"{key}={_value(value)}" for key, value in (part.settings | placing).items())
    return f"{part.name}({settings})" if settings else part.name


def _value(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _split(pattern: str) -> list[str]:
    """At commas outside brackets."""
    elements = re.split(r",(?![^(]*\))", pattern)
    if not pattern.strip() or any(not e.strip() for e in elements):
        raise InputError(f"pattern {pattern!r} has an empty element; write names separated by commas")
    return elements


def _part(name: str, settings: str | None, pattern: str) -> Part:
    known, values, placing = card(name).fields, {}, dict[str, Any]()
    for pair in filter(str.strip, re.split(r",(?![^\[]*\])", settings or "")):  # a list has commas of its own
        key, equals, value = (s.strip() for s in pair.partition("="))
        if not equals:
            raise InputError(f"settings in {pattern!r} are key=value; got {pair.strip()!r}")
        read = _read(value, pattern)
        if key in PLACING:
            placing[key] = read
            if type(read) is not PLACING[key]:
                raise InputError(
                    f"{key} in {pattern!r} is {value}, and must be {'a number' if key == 'tied' else 'true or false'}"
                )
        elif key not in known or key == "d_model":
            raise InputError(f"{name} has no setting {key!r}; {nearest(key, set(known) - {'d_model'})}")
        else:
            values[key] = read
    return Part(name, values, **placing)


def _read(written: str, pattern: str) -> Any:
    if written.lower() == "none":
        return None
    try:
        return yaml.safe_load(written)
    except yaml.YAMLError:
        raise InputError(
            f"cannot read {written!r} in pattern {pattern!r}; write a number, a word or a list [1, 2]"
        ) from None
