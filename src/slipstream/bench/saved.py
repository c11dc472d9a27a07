"""What autograd keeps for the backward pass: the most bytes at any moment of a training step, weights aside."""

from __future__ import annotations

import weakref
from collections import Counter

from jaxtyping import Int
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from slipstream.models.language_model import LanguageModel


class Kept:
    """A tensor that autograd keeps. With its graph it would keep itself."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


class Tally:
    """Bytes that are kept now, and the most that ever were; memory that is kept twice counts once."""

    def __init__(self, spared: set[int]) -> None:
        self.spared, self.now, self.most = spared, 0, 0
        self.keepers: Counter[int] = Counter()  # by address

    def keep(self, tensor: Tensor) -> Kept:
        kept, storage = Kept(tensor), tensor.untyped_storage()
        if (at := storage.data_ptr()) not in self.spared:
            self._count(at, storage.nbytes(), 1)
            weakref.finalize(kept, self._count, at, storage.nbytes(), -1)
        return kept

    def _count(self, at: int, size: int, change: int) -> None:
        before = self.keepers[at] > 0
        self.keepers[at] += change
        self.now += size * ((self.keepers[at] > 0) - before)
        self.most = max(self.most, self.now)


def most_saved(model: LanguageModel, tokens: Int[Tensor, "B T"]) -> int:
    """In one step, forward and backward; the model has no gradients after it."""
    tally = Tally({p.untyped_storage().data_ptr() for p in model.parameters()})
    with saved_tensors_hooks(tally.keep, lambda kept: kept.tensor):
        model(tokens).logsumexp(-1).mean().backward()
    model.zero_grad()
    return tally.most
