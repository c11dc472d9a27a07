"""Mini-batches whose borders stand at fixed positions of each row, wherever a call begins and ends.

A network that takes one step of learning per mini-batch is only one function if token t always belongs to the mini-batch
t // M. A row that comes with a past begins inside one, and ragged rows end where they will: tokens are laid into
(N B H M K) by their own positions, with zeros where this call has none.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.ops.places import cut_out
from slipstream.ops.valid import zero_padding


class MiniBatches:
    """Where the tokens of one call stand. position (B): tokens each row has seen before; size: M."""

    def __init__(
        self, position: Int[Tensor, "B"], tokens: int, size: int, lengths: Int[Tensor, "B"] | None = None
    ) -> None:
        self.begin, self.tokens, self.size, self.lengths = position % size, tokens, size, lengths
        self.end = self.begin + (tokens if lengths is None else lengths)
        self.shift = int(self.begin.max()) if len(position) else 0
        self.n = -(-(self.shift + tokens) // size)

    def lay(self, x: Float[Tensor, "B T *R"]) -> Float[Tensor, "N B M *R"]:
        """Time cut at the borders."""
        x, slots = zero_padding(x, self.lengths), self.n * self.size
        if self.shift:
            x = cut_out(x, -self.begin, slots)
        else:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, slots - self.tokens))
        return x.unflatten(1, (self.n, self.size)).transpose(0, 1)

    def by_head(self, x: Float[Tensor, "B T H *K"]) -> Float[Tensor, "N B H M *K"]:
        return self.lay(x).transpose(2, 3).contiguous()

    def in_order(self, x: Float[Tensor, "N B H M K"]) -> Float[Tensor, "B T H K"]:
        """Back to the order in which the tokens came."""
        line = x.permute(1, 0, 3, 2, 4).flatten(1, 2)
        if not self.shift:
            return line[:, : self.tokens]
        return cut_out(line, self.begin, self.tokens)

    @cached_property
    def _source(self) -> Int[Tensor, "B S"]:
        """For each slot, the token of this call that stands there, if any does."""
        return torch.arange(self.n * self.size, device=self.begin.device) - self.begin[:, None]

    @cached_property
    def here(self) -> Bool[Tensor, "N B M"]:
        """Which slots this call fills."""
        filled = (self._source >= 0) & (self._source < (self.end - self.begin)[:, None])
        return filled.unflatten(1, (self.n, self.size)).transpose(0, 1)

    @cached_property
    def full(self) -> Bool[Tensor, "N B"]:
        """Which mini-batches are complete after this call."""
        return self.end >= (torch.arange(self.n, device=self.end.device)[:, None] + 1) * self.size

    @cached_property
    def plain(self) -> list[bool]:
        """Which mini-batches begin and end inside this call, in every row."""
        return [n > 0 and whole for n, whole in enumerate(self.full.all(-1).tolist())]

    @cached_property
    def last(self) -> Int[Tensor, "N B"]:
        """The last filled slot of each mini-batch (0 where there is none)."""
        first = torch.arange(self.n, device=self.end.device)[:, None] * self.size
        return (self.end - 1 - first).clamp(0, self.size - 1)
