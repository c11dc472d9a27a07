r"""Tiles of an index set: queries that stand alike, and all keys that any of them sees; every seen pair in exactly one tile.

A tile is n queries, `step` apart, that begin at a multiple of n * step: at the same places however a sequence is cut, in
every row of a batch, whose pasts are their own. Members of a union whose queries stand alike share their tiles; a pair
that two members see belongs to the first. Memory is linear in the number of queries: positions, and masks of a few tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from slipstream.ops.index_sets import IndexSet, spaced

TILE = 64  # queries of a tile: enough to fill a matrix product, few enough not to multiply what is masked
AT_ONCE = 1 << 17  # pairs of the tiles that are worked on together: as many as stay in a processor's cache
SPANS = 256  # parts of a sequence by whose ends growing sets of keys are counted


def pairs(index_set: IndexSet, T: int, past: int = 0, causal: bool = True) -> int:
    """Pairs of a query and a key worked on, masked ones too, for T tokens after so many."""
    worked = 0
    for group in groups(index_set, T):
        for span in _spans(group, past, past, T, past + T, causal):
            worked += (span.stop - span.start) * group.tiling.n * group.n_keys(span.until, causal)
    return worked


def density(index_set: IndexSet, T: int, causal: bool = True) -> float:
    """The share of full attention's pairs that is worked on."""
    return pairs(index_set, T, causal=causal) / (T * (T + 1) / 2 if causal else T * T)


@dataclass(frozen=True)
class Tiling:
    """How queries stand in tiles: n of them `step` apart; tiles begin at multiples of n * step, one for each residue."""

    n: int
    step: int = 1
    residues: tuple[int, int] = (0, 1)  # the first, and how many

    @property
    def period(self) -> int:
        return self.n * self.step


Part = tuple[IndexSet, tuple[IndexSet, ...]]  # a member, and those before it, whose pairs it must leave out


@dataclass(frozen=True)
class Group:
    """Members of a set that share tiles."""

    tiling: Tiling
    parts: tuple[Part, ...]

    @property
    def bounded(self) -> bool:
        return all(part.bounded for part, _ in self.parts)

    def n_keys(self, until: int, causal: bool) -> int:
        return sum(part.n_keys(self.tiling.n, until, causal) for part, _ in self.parts)


def groups(index_set: IndexSet, T: int) -> list[Group]:
    """The members by how their queries stand. One query alone stands like any other."""
    members = index_set.members
    parts = [(member, members[:i]) for i, member in enumerate(members)]
    if T == 1:
        return [Group(Tiling(1), tuple(parts))]
    alike: dict[tuple[int, tuple[int, int]], list[Part]] = {}
    for part in parts:
        if not part[0].follows:
            alike.setdefault((part[0].step, part[0].residues), []).append(part)
    leader = next((key for key in alike if key[1][1] == key[0]), (1, (0, 1)))
    for part in parts:
        if part[0].follows:
            alike.setdefault(leader, []).append(part)
    return [
        Group(_tiling(step, residues, [m for m, _ in own], T), tuple(own)) for (step, residues), own in alike.items()
    ]


def _tiling(step: int, residues: tuple[int, int], members: Sequence[IndexSet], T: int) -> Tiling:
    """No more queries to a tile than there are; where fewer come than the step, each is a tile of its own."""
    if 1 < step >= T:
        return Tiling(1)
    n = math.gcd(*(m.block for m in members)) or TILE
    if n > 2 * TILE:
        n = max((d for d in range(TILE // 4, 2 * TILE + 1) if n % d == 0), default=n)
    while n % 2 == 0 and n // 2 * step >= T:
        n //= 2
    return Tiling(n, step, residues)


@dataclass(frozen=True)
class Span:
    """Tiles start..stop of every row, residue by residue from where its past ends on; their keys stand before `until`."""

    start: int
    stop: int
    until: int


def _spans(group: Group, least: int, most: int, T: int, end: int, causal: bool) -> Iterator[Span]:
    """All tiles of rows that have seen `least` to `most` tokens and hold no keys from `end` on.

    Where the keys grow with the position, they are counted to the end of one of SPANS parts.
    """
    period, each = group.tiling.period, group.tiling.residues[1]
    count = (most % period + T - 1 if least == most else T + period - 2) // period + 1 if T else 0
    places = count if group.bounded else -(-count // SPANS)
    for begin in range(0, count, max(1, places)):
        stop = min(count, begin + places)
        yield Span(begin * each, stop * each, min(end, (most // period + stop) * period) if causal else end)


def _together(span: Span, group: Group, causal: bool) -> Iterator[Span]:
    """As many tiles as are worked on at once."""
    step = max(1, AT_ONCE // max(1, group.tiling.n * group.n_keys(span.until, causal)))
    for start in range(span.start, span.stop, step):
        yield Span(start, min(span.stop, start + step), span.until)


@dataclass(frozen=True)
class Tile:
    """N tiles of every row: n queries (-1: none), m keys, and which of them meet. Keys outside of a row meet nobody."""

    queries: Int[Tensor, "R N n"]
    keys: Int[Tensor, "R N m"]
    meets: Bool[Tensor, "R N n m"]


def tiles(
    group: Group, past: Int[Tensor, "R"], T: int, end: int, causal: bool = True, ends: Int[Tensor, "R"] | None = None
) -> Iterator[Tile]:
    """All tiles of T queries that stand at past, past + 1, ... in their rows, of which no key stands at `end` or further.

    ends: where the keys of each row end, if not with its queries (causal=False). Nothing is read from the device but the
    extremes of past, and that neither for one query nor while a graph is captured.
    """
    least, most = 0, max(0, end - T)
    if T > 1 and len(past) and not torch.compiler.is_compiling():
        least, most = int(past.min()), int(past.max())
    past = past.to(torch.int32)
    for whole in _spans(group, least, most, T, end, causal):
        for span in _together(whole, group, causal):
            index = torch.arange(span.start, span.stop, device=past.device, dtype=torch.int32)
            yield _tile(group, _first(group.tiling, past, index), past, T, span.until, causal, ends)


def _first(tiling: Tiling, past: Int[Tensor, "R"], index: Int[Tensor, "N"]) -> Int[Tensor, "R N"]:
    """The first query of each tile."""
    start, each = tiling.residues
    return (past[:, None] // tiling.period + index // each) * tiling.period + start + index % each


def _tile(
    group: Group, first: Tensor, past: Tensor, T: int, until: int, causal: bool, ends: Int[Tensor, "R"] | None
) -> Tile:
    queries = spaced(first, group.tiling.n, group.tiling.step)
    t, keys, seen = queries[..., None], [], []
    for part, before in group.parts:
        keys.append(part.keys(first, group.tiling.n, until, causal))
        s = keys[-1][..., None, :]
        seen.append(part.sees(t, s) & (s >= 0))
        for other in before:
            seen[-1] &= ~other.sees(t, s)
    past = past[:, None, None]
    s = torch.cat(keys, -1)
    filled = s[..., None, :] <= t if causal else (s < (past + T if ends is None else ends[:, None, None]))[..., None, :]
    inside = (queries >= past) & (queries < past + T)
    return Tile(queries.masked_fill(~inside, -1), s, torch.cat(seen, -1) & filled)
