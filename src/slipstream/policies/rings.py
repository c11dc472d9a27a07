"""Attention sinks and a window: the first few tokens of a row and its last ones, in slots that never grow.

The sinks lie at the beginning, the window behind them as a ring: position p stands in place sinks + (p - sinks) mod window.
Keys are kept as they were made, at their own positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from slipstream.core.state import grow
from slipstream.ops.attention import write_cache
from slipstream.ops.softmax import merge, read_with_lse, with_sinks
from slipstream.policies.policy import Reading

SINKS = 4  # tokens whose attention a softmax cannot do without (Xiao et al. 2023, sec. 3.1)


@dataclass(frozen=True)
class Ring:
    """Which positions of a row of some length are held, and where."""

    window: int
    sinks: int = SINKS

    @property
    def size(self) -> int:
        return self.sinks + self.window

    def evicted(self, length: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """Tokens that are gone: those between the sinks and the window."""
        return (length - self.size).clamp(min=0)

    def place(self, position: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
        return torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % self.window)

    def positions(self, length: Int[Tensor, "B"]) -> Int[Tensor, "B N"]:
        """What stands in each place; -1 for nothing."""
        place = torch.arange(self.size, device=length.device)
        newest = length[:, None] - 1 - self.sinks
        behind = newest - (newest - (place - self.sinks)) % self.window
        ringed = torch.where(behind >= 0, behind + self.sinks, -1)
        return torch.where(place < self.sinks, torch.where(place < length[:, None], place, -1), ringed)

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: tuple[Tensor, Tensor],
        past: Tensor,
        lengths: Tensor | None,
        how: Reading,
    ) -> tuple[Float[Tensor, "B T H V"], tuple[Tensor, Tensor]]:
        """New tokens read what is held and one another. slots: keys and values."""
        kept = past.clamp(max=self.size)
        keys, values = (self._line(*pair, past, kept, lengths) for pair in zip(slots, (k, v)))
        turned = torch.cat([self._sinks(keys, past, how), keys[:, self.sinks :]], 1)
        o = how.prompt.attend(q, turned, values, kept, lengths, how.softmax)
        length = past + (q.shape[1] if lengths is None else lengths)
        return o, (self._held(keys, past, length), self._held(values, past, length))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, slots: tuple[Tensor, Tensor], past: Tensor, how: Reading
    ) -> tuple[Float[Tensor, "B 1 H V"], tuple[Tensor, Tensor]]:
        """The same of one token, which then takes the place of the oldest of the window."""
        keys, values = slots
        met, parts = (self.positions(past) >= 0)[:, None, None], []
        turned = self._sinks(keys, past, how)
        for part, tile in ((turned, slice(self.sinks)), (keys[:, self.sinks :], slice(self.sinks, None))):
            parts.append(read_with_lse(q, part, values[:, tile], met[..., tile], how.softmax))
        parts.append(read_with_lse(q, k, v, None, how.softmax))
        place = self.place(past)
        return with_sinks(*merge(parts), how.softmax), (write_cache(keys, k, place), write_cache(values, v, place))

    def _sinks(self, keys: Tensor, past: Tensor, how: Reading) -> Float[Tensor, "B s G K"]:
        """Their keys, as near to the window as they stand in the cache."""
        sinks = keys[:, : self.sinks]
        return how.turn(sinks, self.evicted(past)[:, None].expand(-1, sinks.shape[1]))

    def _line(
        self, slot: Tensor, new: Tensor, past: Tensor, kept: Tensor, lengths: Tensor | None
    ) -> Shaped[Tensor, "B S G _"]:
        """What is held, in order, and the new tokens behind."""
        place = torch.arange(self.size, device=past.device)
        position = torch.where(place < self.sinks, place, place + self.evicted(past)[:, None])
        held = _rows(slot, self.place(position))
        return write_cache(grow(held, self.size + new.shape[1]), new, kept, lengths)

    def _held(self, line: Tensor, past: Tensor, length: Tensor) -> Shaped[Tensor, "B N G _"]:
        """What the slots hold of a line that began with what was held after `past`."""
        position = self.positions(length)
        index = torch.where(position < self.sinks, position, position - self.evicted(past)[:, None])
        return torch.where((index >= 0)[..., None, None], _rows(line, index.clamp(min=0)), 0)


def _rows(x: Tensor, index: Int[Tensor, "B N"]) -> Tensor:
    return x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:]))
