"""A sequence that grows piece by piece, and whose pieces join like the digits of a binary counter: never more than log2 of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

P = TypeVar("P")


class Pieces(Generic[P]):
    """Two neighbours that hold as many are joined by join(earlier, later): each is joined log2 of all times in the end."""

    def __init__(self, join: Callable[[P, P], P]) -> None:
        self.join = join
        self._held: list[tuple[int, P]] = []

    def append(self, piece: P) -> None:
        n = 1
        while self._held and self._held[-1][0] == n:
            piece, n = self.join(self._held.pop()[1], piece), 2 * n
        self._held.append((n, piece))

    def __iter__(self) -> Iterator[P]:
        return (piece for _, piece in self._held)


def met(n: int) -> int:
    """How many pieces are held, summed over all moments before the n-th is appended: the binary digits of 0, 1, ..., n-1."""
    total, bit = 0, 1
    while bit < n:
        total += n // (2 * bit) * bit + max(0, n % (2 * bit) - bit)
        bit *= 2
    return total


def joins(n: int) -> list[tuple[int, int]]:
    """(pieces on each side, how many such joins) while n pieces are appended."""
    return [(1 << level, n >> (level + 1)) for level in range(n.bit_length()) if n >> (level + 1)]
