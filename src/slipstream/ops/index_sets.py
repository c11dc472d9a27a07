r"""Index sets: a small language for which keys a query sees, and the tiles of queries and keys that its work is done in.

    Window(w) | Global(n)          the last w tokens, and the first n
    Window(l) | Strided(l)         Sparse Transformer, strided           fixed(l, c)     the same, fixed
    Blocks(b)                      one's own block                       Segments(b, 1)  and the one before it
    RandomBlocks(b, r)             r blocks drawn for every block        Dilated(w, r)   every r-th token of one's segment

`sees(t, s)` is the definition, on absolute positions; `a | b` is the union. A set knows no time: where a caller is causal,
the future (s > t) is cut off it, and Window(w) then has w - 1 tokens to one side only.

For work, a set gives the keys that a tile of queries sees: ops/index_tiles lays the tiles. Queries that see the same keys
stand `step` apart (dilated, strided), and so do the queries of a tile: work goes with the pairs kept, not with the span.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class IndexSet(ABC):
    """Which keys a query sees. Every position is absolute."""

    follows: ClassVar[bool] = False  # any tile of any queries will do: it joins the tiles of others
    bounded: ClassVar[bool] = True  # a query sees no more keys however late it comes

    @abstractmethod
    def sees(self, t: Int[Tensor, "*A"], s: Int[Tensor, "*B"]) -> Bool[Tensor, "*C"]:
        """Where query t sees key s; the shapes broadcast."""

    @abstractmethod
    def keys(self, first: Int[Tensor, "R N"], n: int, until: int, causal: bool) -> Int[Tensor, "R N M"]:
        """M positions, each once, that hold all keys that n queries, `step` apart from `first` on, see.

        None that is seen stands at `until` or further.
        """

    @abstractmethod
    def n_keys(self, n: int, until: int, causal: bool) -> int:
        """M of keys."""

    @property
    def step(self) -> int:
        """Queries that see the same keys stand so far apart."""
        return 1

    @property
    def block(self) -> int:
        """A tile must not cross multiples of so many queries (of one residue); 0 where it may."""
        return 0

    @property
    def residues(self) -> tuple[int, int]:
        """Which positions modulo step see anything: the first, and how many from it on."""
        return 0, self.step

    @property
    def members(self) -> tuple[IndexSet, ...]:
        return (self,)

    def __or__(self, other: IndexSet) -> IndexSet:
        return Union(self.members + other.members)


@dataclass(frozen=True)
class Union(IndexSet):
    """What any member sees."""

    parts: tuple[IndexSet, ...]

    @property
    def members(self) -> tuple[IndexSet, ...]:
        return self.parts

    def sees(self, t: Tensor, s: Tensor) -> Tensor:
        seen = self.parts[0].sees(t, s)
        for part in self.parts[1:]:
            seen = seen | part.sees(t, s)
        return seen

    def keys(self, first: Tensor, n: int, until: int, causal: bool) -> Tensor:
        return torch.cat([part.keys(first, n, until, causal) for part in self.parts], -1)

    def n_keys(self, n: int, until: int, causal: bool) -> int:
        return sum(part.n_keys(n, until, causal) for part in self.parts)


@dataclass(frozen=True)
class Window(IndexSet):
    """The last w keys, oneself included, `dilation` apart; and as many after oneself where the future is seen."""

    w: int
    dilation: int = 1

    @property
    def step(self) -> int:
        return self.dilation

    def sees(self, t: Tensor, s: Tensor) -> Tensor:
        apart = t - s
        near = (apart < self.w * self.dilation) & (apart > -self.w * self.dilation)
        return near if self.dilation == 1 else near & (t % self.dilation == s % self.dilation)

    def keys(self, first: Tensor, n: int, until: int, causal: bool) -> Tensor:
        begin = first - (self.w - 1) * self.dilation
        return spaced(begin, self.n_keys(n, until, causal), self.dilation)

    def n_keys(self, n: int, until: int, causal: bool) -> int:
        return n - 1 + self.w + (0 if causal else self.w - 1)


@dataclass(frozen=True)
class Global(IndexSet):
    """n positions that all see: the first, or those from `at` on."""

    n: int
    at: int = 0
    follows = True

    def sees(self, t: Tensor, s: Tensor) -> Tensor:
        return (s >= self.at) & (s < self.at + self.n) & (t >= 0)

    def keys(self, first: Tensor, n: int, until: int, causal: bool) -> Tensor:
        return spaced(torch.full_like(first, self.at), self.n)

    def n_keys(self, n: int, until: int, causal: bool) -> int:
        return self.n


@dataclass(frozen=True)
class Segments(IndexSet):
    """One's own segment of `size` positions and the `back` before it; and as many after it where the future is seen."""

    size: int
    back: int = 1

    @property
    def block(self) -> int:
        return self.size

    def sees(self, t: Tensor, s: Tensor) -> Tensor:
        apart = t // self.size - s // self.size
        return (apart <= self.back) & (apart >= -self.back)

    def keys(self, first: Tensor, n: int, until: int, causal: bool) -> Tensor:
        begin = first - first % self.size - self.back * self.size
        return spaced(begin, self.n_keys(n, until, causal))

    def n_keys(self, n: int, until: int, causal: bool) -> int:
        return self.size * (1 + self.back + (0 if causal else self.back))


def Blocks(size: int) -> IndexSet:
    """One's own block."""
    return Segments(size, 0)


@dataclass(frozen=True)
class Dilated(IndexSet):
    """Every rate-th position of a segment, from `offset` on, sees its like in the segment; the others see nothing (LongNet)."""

    segment: int
    rate: int
    offset: int = 0

    @property
    def step(self) -> int:
        return self.rate

    @property
    def block(self) -> int:
        return self.segment // self.rate

    @property
    def residues(self) -> tuple[int, int]:
        return self.offset, 1

    def sees(self, t: Tensor, s: Tensor) -> Tensor:
        alike = (t % self.rate == self.offset) & (s % self.rate == self.offset)
        return alike & (t // self.segment == s // self.segment)

    def keys(self, first: Tensor, n: int, until: int, causal: bool) -> Tensor:
        return spaced(first - first % self.segment + self.offset, self.block, self.rate)

    def n_keys(self, n: int, until: int, causal: bool) -> int:
        return self.block


@dataclass(frozen=True)
class Strided(IndexSet):
    """All positions a multiple of `stride` away."""

    stride: int
    bounded = False

    @property
    def step(self) -> int:
        return self.stride

    def sees(self, t: Tensor, s: Tensor) -> Tensor:
        return t % self.stride == s % self.stride

    def keys(self, first: Tensor, n: int, until: int, causal: bool) -> Tensor:
        return spaced(first % self.stride, self.n_keys(n, until, causal), self.stride)

    def n_keys(self, n: int, until: int, causal: bool) -> int:
        return -(-until // self.stride)


@dataclass(frozen=True)
class Summaries(IndexSet):
    """The last c positions of every block of `size`."""

    size: int
    c: int
    bounded = False
    follows = True

    def sees(self, t: Tensor, s: Tensor) -> Tensor:
        return (s % self.size >= self.size - self.c) & (t >= 0)

    def keys(self, first: Tensor, n: int, until: int, causal: bool) -> Tensor:
        ends = spaced(torch.full_like(first, self.size - self.c), -(-until // self.size), self.size)
        return spaced(ends, self.c).flatten(-2)

    def n_keys(self, n: int, until: int, causal: bool) -> int:
        return self.c * -(-until // self.size)


def fixed(size: int, c: int) -> IndexSet:
    """Sparse Transformer's fixed pattern: one's own block, and the last c positions of every other."""
    return Blocks(size) | Summaries(size, c)


@dataclass(frozen=True)
class RandomBlocks(IndexSet):
    """n blocks drawn for every block of queries: the same at every call, whatever the sequence's length.

    Drawn from the blocks `first`, first + 1, ... that stand `near` blocks back or further; and, where `end` is given, from
    those as far ahead, before block `end`. Each is drawn from one n-th of them, so that no block comes twice.
    """

    size: int
    n: int
    seed: int = 0
    first: int = 0
    near: int = 1
    end: int = 0

    @property
    def block(self) -> int:
        return self.size

    def drawn(self, own: Int[Tensor, "*A"]) -> Int[Tensor, "*A N"]:
        """The blocks drawn for blocks of queries; -1 where there are too few."""
        before = (own - self.near + 1 - self.first).clamp(min=0)
        choices = (before + (self.end - own - self.near).clamp(min=0))[..., None]
        part = torch.arange(self.n, device=own.device, dtype=own.dtype)
        low, high = choices * part // self.n, choices * (part + 1) // self.n
        pick = low + _scattered(own[..., None], part, self.seed) % (high - low).clamp(min=1)
        ahead = (own + self.near - self.first)[..., None].clamp(min=0) - before[..., None]
        block = self.first + torch.where(pick < before[..., None], pick, pick + ahead)
        return torch.where(high > low, block, -1)

    def sees(self, t: Tensor, s: Tensor) -> Tensor:
        drawn, block = self.drawn(t // self.size), s // self.size
        seen = drawn[..., 0] == block
        for i in range(1, self.n):
            seen = seen | (drawn[..., i] == block)
        return seen & (s >= 0)

    def keys(self, first: Tensor, n: int, until: int, causal: bool) -> Tensor:
        return spaced(self.drawn(first // self.size) * self.size, self.size).flatten(-2)

    def n_keys(self, n: int, until: int, causal: bool) -> int:
        return self.n * self.size


def spaced(begin: Int[Tensor, "*A"], n: int, step: int = 1) -> Int[Tensor, "*A n"]:
    return begin[..., None] + step * torch.arange(n, device=begin.device, dtype=begin.dtype)


def _scattered(a: Tensor, b: Tensor, seed: int) -> Int[Tensor, "*A"]:
    """A number of 31 bits that looks like chance, made of three."""
    h = a.long() * 2654435761 + b.long() * 2246822519 + (seed + 1) * 3266489917
    for factor in (0x45D9F3B, 0x2C1B3C6D):
        h = h & 0x7FFFFFFF
        h = (h ^ (h >> 15)) * factor
    h = h & 0x7FFFFFFF
    return (h ^ (h >> 13)).to(a.dtype)
