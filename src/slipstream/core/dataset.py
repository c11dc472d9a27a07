"""What the trainer asks of data: batches that are a pure function of (seed, step), and a fixed validation part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from jaxtyping import Int
from torch import Tensor


class Dataset(ABC):
    """Sequences for training and for validation. It keeps no position, so there is none to save or to lose."""

    bytes_per_token: float  # over all of the data, to turn a training loss into bits per byte

    @property
    @abstractmethod
    def tokens_per_sequence(self) -> int:
        """Predictions that one sequence gives."""

    @abstractmethod
    def batch(self, step: int, batch_size: int, seed: int) -> Int[Tensor, "B L"]:
        """The sequences of one step: the same arguments give the same batch, whatever was asked before."""

    @abstractmethod
    def validation(self, batch_size: int, most: int | None = None) -> Iterator[tuple[Int[Tensor, "B L"], int]]:
        """Fixed, non-overlapping sequences and the bytes their predictions stand for; `most` of them, spread evenly."""
