"""A fixed number of entries in which each row, and in it each key head by itself, keeps the tokens that it holds worth keeping.

Entries lie in no order, which reading does not mind: a slot `at` says at which position each one stood, -1 where it is free.
To read a prompt they are laid out in order, the new tokens behind them; of that line is taken what is kept. One new token
(`replaced`) takes the place of another without moving the rest. All heads of a row keep equally many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from slipstream.core.state import Slot, grow
from slipstream.ops.attention import write_cache
from slipstream.ops.chosen_attention import choose
from slipstream.ops.softmax import Softmax, merge, read_with_lse
from slipstream.policies.policy import KVHeads, Reading

FREE = -1
Entries = dict[str, Tensor]  # name -> (B N G ...), "k", "v" and "at" among them


def entry_slots(kv: KVHeads, entries: int, **more: torch.dtype) -> dict[str, Slot]:
    """Room for so many; more: numbers that are kept beside each, by name."""
    beside = {name: Slot((entries, kv.n_kv_heads), dtype=dtype) for name, dtype in more.items()}
    return kv.slots(entries) | {"at": Slot((entries, kv.n_kv_heads), dtype=torch.int32, start=FREE)} | beside


@dataclass(frozen=True)
class Line:
    """Entries in the order of their positions, then the new tokens: `kept` (B) of the former, `held` (B) of both."""

    entries: Entries
    kept: Int[Tensor, "B"]
    held: Int[Tensor, "B"]

    @property
    def places(self) -> Int[Tensor, "S"]:
        return torch.arange(self.entries["k"].shape[1], device=self.kept.device)

    def read(self, q: Float[Tensor, "B T H K"], lengths: Int[Tensor, "B"] | None, how: Reading) -> Tensor:
        """The new tokens read what is kept and one another."""
        return how.prompt.attend(q, self.entries["k"], self.entries["v"], self.kept, lengths, how.softmax)

    def ends(self, tokens: int) -> Int[Tensor, "B T"]:
        """Behind what a new token sees of the line; 0 for padding."""
        own = self.kept[:, None] + torch.arange(tokens, device=self.kept.device)
        return torch.where(own < self.held[:, None], own + 1, 0)

    def best(
        self, worth: Float[Tensor, "B S G"], n: int, among: Bool[Tensor, "B S"] | None = None
    ) -> Int[Tensor, "B n G"]:
        """Where the n of largest worth stand, in order; of equal ones the earliest; -1 where there are fewer."""
        held = self.places < self.held[:, None]
        held = held if among is None else held & among
        return choose(worth.transpose(1, 2)[:, None], held[:, None, None], n)[:, 0].transpose(1, 2)

    def taken(self, index: Int[Tensor, "B N G"]) -> Entries:
        """The entries at these places of the line; -1 for a free one."""
        free = index < 0
        taken = {name: _gathered(x, index.clamp(min=0)) for name, x in self.entries.items()}
        return {n: torch.where(_like(free, x), FREE if n == "at" else 0, x) for n, x in taken.items()}


def line_of(entries: Entries, new: Entries, past: Int[Tensor, "B"], lengths: Int[Tensor, "B"] | None) -> Line:
    """new: (B T G ...) by name, without positions: they stand behind `past`."""
    at, tokens = entries["at"], new["k"].shape[1]
    kept = (at[:, :, 0] >= 0).sum(1)
    order = torch.where(at < 0, torch.iinfo(at.dtype).max, at).argsort(dim=1, stable=True)
    room = at.shape[1] + tokens
    ordered = {name: grow(_gathered(x, order), room) for name, x in entries.items()}
    line = {name: write_cache(ordered[name], x, kept, lengths) for name, x in new.items()}
    place = torch.arange(room, device=at.device)
    behind = (past[:, None] + place - kept[:, None])[..., None].to(at.dtype)
    line["at"] = torch.where((place < kept[:, None])[..., None], ordered["at"], behind)
    return Line(line, kept, kept + (tokens if lengths is None else lengths))


def read_one(
    q: Float[Tensor, "B 1 H K"], entries: Entries, new: Entries, softmax: Softmax
) -> tuple[Float[Tensor, "B 1 H V"], Float[Tensor, "B 1 H"]]:
    """One token reads the entries and itself. With the logarithm of the denominator, both without sinks."""
    heads = q.shape[2] // new["k"].shape[2]
    met = (entries["at"] >= 0).repeat_interleave(heads, 2).transpose(1, 2)[:, :, None]
    kept = read_with_lse(q, entries["k"], entries["v"], met, softmax)
    return merge([kept, read_with_lse(q, new["k"], new["v"], None, softmax)])


def replaced(entries: Entries, new: Entries, past: Int[Tensor, "B"], worth: Float[Tensor, "B N G"]) -> Entries:
    """One new token in a free entry, else in that of least worth; of equal ones the latest gives way."""
    at = entries["at"]
    value = torch.where(at < 0, -torch.inf, worth)
    least = value == value.amin(1, keepdim=True)
    place = torch.where(least, at, FREE - 1).argmax(1)
    position = past[:, None, None].expand(-1, 1, at.shape[2])
    return {n: _put(x, position if n == "at" else new[n], place) for n, x in entries.items()}


def _put(x: Tensor, new: Shaped[Tensor, "B 1 G *R"], place: Int[Tensor, "B G"]) -> Tensor:
    """The entries are consumed: written in place where no gradient needs them."""
    rows, heads = (torch.arange(n, device=x.device) for n in place.shape)
    index, value = (rows[:, None], place, heads), new[:, 0].to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or value.requires_grad):
        return x.index_put(index, value)
    return x.index_put_(index, value)


def _gathered(x: Shaped[Tensor, "B S G *R"], index: Int[Tensor, "B N G"]) -> Shaped[Tensor, "B N G *R"]:
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:]))


def _like(mask: Bool[Tensor, "B N G"], x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (x.ndim - 3))
