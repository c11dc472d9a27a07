"""Windows of tokens in an order that is a pure function of (seed, step).

Each epoch cuts the tokens into windows from a random start and takes them in a random order, so every token is read
about once before any is read again; what an epoch is follows from the step alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Windows:
    """tokens cut into windows of `context` predictions: context + 1 tokens, the last shared with the next window."""

    tokens: np.ndarray
    context: int

    @property
    def per_epoch(self) -> int:
        """Windows of one epoch; one fewer than fit, so that the start can be moved by at least a window."""
        return max(1, (len(self.tokens) - 1) // self.context - 1)

    def batch(self, step: int, batch_size: int, seed: int) -> Int[Tensor, "B L"]:
        return self.at([self._offset(n, seed) for n in range(step * batch_size, (step + 1) * batch_size)])

    def spread(
        self, sizes: np.ndarray, batch_size: int, most: int | None = None
    ) -> Iterator[tuple[Int[Tensor, "B L"], int]]:
        """Windows that lie side by side, or so many of them spread over all, each batch with the bytes of what is predicted
        in it. sizes: bytes that each token stands for."""
        windows = (len(self.tokens) - 1) // self.context
        taken = min(windows, most or windows)
        offsets = [i * windows // taken * self.context for i in range(taken)]
        for i in range(0, taken, batch_size):
            some = offsets[i : i + batch_size]
            yield self.at(some), sum(int(sizes[o + 1 : o + self.context + 1].sum()) for o in some)

    def at(self, offsets: list[int]) -> Int[Tensor, "B L"]:
        """The windows that begin at these tokens."""
        rows = [self.tokens[o : o + self.context + 1].astype(np.int64) for o in offsets]
        return torch.from_numpy(np.stack(rows))

    def _offset(self, n: int, seed: int) -> int:
        """Where the n-th window of the whole training begins."""
        epoch, i = divmod(n, self.per_epoch)
        slack = len(self.tokens) - 1 - self.per_epoch * self.context
        start, order = _epoch(seed, epoch, self.per_epoch, slack)
        return start + int(order[i]) * self.context


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, windows: int, slack: int) -> tuple[int, np.ndarray]:
    """The start and the order of one epoch; kept because the next window asks for the same."""
    random = np.random.default_rng([seed, epoch])
    return int(random.integers(slack + 1)), random.permutation(windows)
