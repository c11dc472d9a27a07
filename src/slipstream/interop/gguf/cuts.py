"""All ways to cut words in two tokens of a vocabulary: half a million for 262,144 tokens, in half a second.

Texts are told apart by hashes of 64 bits, h(c_0 c_1 ...) = sum_i c_i M^i modulo 2^64, so that the hash of any part of a word is a
difference of one running sum over all words. That two texts share a hash has a chance of 1e-8 in a whole vocabulary, unless it was
made for that: then it has merges that are none, and is refused or cuts words oddly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

M = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
BITS = 24  # of a hash that are looked at first: most texts that are no token are seen by them


def cuts_in_two(words: Sequence[str], tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of tokens whose join is a word, word by word."""
    known, parts = _Known(tokens), _Parts(words)
    word = np.repeat(np.arange(len(words)), parts.lengths)
    begin, cut = parts.starts[word], np.arange(len(word))  # before each character but the first
    begin, cut, end = (places[cut > begin] for places in (begin, cut, begin + parts.lengths[word]))
    heads, tails = parts.hashes(begin, cut), parts.hashes(cut, end)
    maybe = known.maybe(heads) & known.maybe(tails)
    left, right = known.find(heads[maybe]), known.find(tails[maybe])
    found = (left >= 0) & (right >= 0)
    return list(zip(*(map(tokens.__getitem__, ids[found].tolist()) for ids in (left, right))))


class _Parts:
    """All parts of these texts, by their places in all of them one after another."""

    def __init__(self, texts: Sequence[str]) -> None:
        characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
        self.lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.back = _powers(pow(M, -1, 1 << 64), len(characters) + 1)
        self.sums = np.zeros(len(characters) + 1, np.uint64)
        np.cumsum(characters * _powers(M, len(characters)), out=self.sums[1:])

    def hashes(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        return (self.sums[end] - self.sums[start]) * self.back[start]


class _Known:
    """Which token has a hash."""

    def __init__(self, tokens: Sequence[str]) -> None:
        parts = _Parts(tokens)
        hashes = parts.hashes(parts.starts, parts.starts + parts.lengths)
        self.ids = np.argsort(hashes)
        self.hashes = hashes[self.ids]
        self.first_bits = np.zeros(1 << BITS, bool)
        self.first_bits[_first_bits(hashes)] = True

    def maybe(self, hashes: np.ndarray) -> np.ndarray:
        return self.first_bits[_first_bits(hashes)]

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Ids, -1 where no token has it."""
        places = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        return np.where(self.hashes[places] == hashes, self.ids[places], -1)


def _first_bits(hashes: np.ndarray) -> np.ndarray:
    return hashes >> np.uint64(64 - BITS)


def _powers(base: int, count: int) -> np.ndarray:
    """1, base, base^2, ... modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)
