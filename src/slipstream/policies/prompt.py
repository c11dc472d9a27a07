"""What a policy looks at to choose which blocks of keys a prompt reads, and the ways of choosing that several share.

Estimates are made of what is real alone: neither padding nor what stands in a cache behind a row's last token reaches them.
They have no gradient. Memory goes with the tokens and with the pairs of blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.ops.block_sparse import block_sparse, blocks_of
from slipstream.ops.places import cut_out
from slipstream.ops.softmax import Softmax
from slipstream.ops.valid import zero_padding
from slipstream.policies.policy import PrefillPolicy


class Choice(NamedTuple):
    """What the blocks of queries of every head read, in the words of ops/block_sparse."""

    blocks: Bool[Tensor, "B H N M"]
    columns: Bool[Tensor, "B H L"] | None = None


class Prompt:
    """Queries, the keys that they may see (L of them, a whole number of blocks, zero where a row has none), and estimates."""

    def __init__(
        self,
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B S G K"],
        past: Int[Tensor, "B"],
        lengths: Int[Tensor, "B"] | None,
        softmax: Softmax,
        block_size: int,
    ) -> None:
        wide, tokens = torch.promote_types(q.dtype, torch.float32), q.shape[1]
        self.own, self.n_blocks = blocks_of(past, tokens, block_size)
        self.past, self.block_size, self.softmax = past, block_size, softmax
        self.scale = softmax.scale_of(q.shape[3])
        self.lengths = torch.full_like(past, tokens) if lengths is None else lengths
        self.ends = past + self.lengths
        self.q, room = zero_padding(q.detach(), lengths).to(wide), self.n_blocks * block_size
        k = F.pad(k.detach()[:, :room], (0, 0, 0, 0, 0, max(0, room - k.shape[1]))).to(wide)
        self.k = k if bool((self.ends == room).all()) else zero_padding(k, self.ends)

    @cached_property
    def q_blocks(self) -> Float[Tensor, "B N t H K"]:
        """The queries block by block, zero where a block has none."""
        rows = cut_out(self.q, -(self.past % self.block_size), self.own.shape[1] * self.block_size)
        return rows.unflatten(1, (self.own.shape[1], self.block_size))

    @cached_property
    def mean_keys(self) -> Float[Tensor, "B M G K"]:
        """Of the keys that a block has."""
        first = torch.arange(self.n_blocks, device=self.past.device) * self.block_size
        held = (self.ends[:, None] - first).clamp(1, self.block_size)
        return self.k.unflatten(1, (self.n_blocks, -1)).sum(2) / held[..., None, None]

    @cached_property
    def mean_queries(self) -> Float[Tensor, "B N H K"]:
        """Of the queries that a block has."""
        first = self.own * self.block_size
        held = (
            torch.minimum(self.ends[:, None], first + self.block_size) - torch.maximum(self.past[:, None], first)
        ).clamp(1)
        return self.q_blocks.sum(2) / held[..., None, None]

    @property
    def asking(self) -> Bool[Tensor, "B N"]:
        """Which blocks have queries."""
        return self.own * self.block_size < self.ends[:, None]

    def logits(self, q: Float[Tensor, "B n H K"], k: Float[Tensor, "B m G K"]) -> Float[Tensor, "B H n m"]:
        """As attention has them, of any queries and keys."""
        q = q.transpose(1, 2).unflatten(1, (k.shape[2], -1)) * self.scale
        return self.softmax.capped((q @ k.permute(0, 2, 3, 1)[:, :, None]).flatten(1, 2))

    def mean_of(self, tokens: Int[Tensor, "B n"]) -> Float[Tensor, "B 1 H K"]:
        """The mean of some queries; -1 for none."""
        real = (tokens >= 0)[..., None, None]
        return torch.where(real, self._asked(tokens), 0).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)

    def weights(self, tokens: Int[Tensor, "B n"]) -> Float[Tensor, "B H n L"]:
        """What some of the queries attend to. tokens: counted from the first new one; -1 for none, which attends to nothing."""
        seen = torch.arange(self.k.shape[1], device=tokens.device) <= (self.past[:, None] + tokens)[..., None]
        weights = self.logits(self._asked(tokens), self.k).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        return torch.where(tokens[:, None, :, None] >= 0, weights, 0)

    def _asked(self, tokens: Int[Tensor, "B n"]) -> Float[Tensor, "B n H K"]:
        return self.q.gather(1, tokens.clamp(min=0)[..., None, None].expand(-1, -1, *self.q.shape[2:]))

    def last(self, n: int) -> Int[Tensor, "B n"]:
        """The last n queries of each row; -1 for those that it does not have."""
        return (self.lengths[:, None] - n + torch.arange(n, device=self.past.device)).clamp(min=-1)

    def spread(self, n: int) -> Int[Tensor, "B n"]:
        """n queries of each row, evenly spread; -1 where it has none."""
        place = (2 * torch.arange(n, device=self.past.device) + 1) * self.lengths[:, None] // (2 * n)
        return torch.minimum(place, self.lengths[:, None] - 1)

    def by_blocks(self, x: Float[Tensor, "... L"]) -> Float[Tensor, "... M"]:
        """Sums over the keys of a block."""
        return x.unflatten(-1, (self.n_blocks, self.block_size)).sum(-1)

    def slashes(self, weights: Float[Tensor, "B H n L"], tokens: Int[Tensor, "B n"]) -> Float[Tensor, "B H M"]:
        """How much is attended to at each distance, counted in blocks. Queries that look s tokens back look s // L blocks
        back, or one more where they stand in the first s % L places of theirs."""
        distance = torch.arange(self.k.shape[1], device=tokens.device)
        key = (self.past[:, None] + tokens)[..., None] - distance
        index = key.clamp(min=0)[:, None].expand(weights.shape)
        at = torch.where(key[:, None] >= 0, weights.gather(3, index), 0).sum(2)
        spilled = at * (distance % self.block_size) / self.block_size
        far = self.by_blocks(spilled).roll(1, -1)
        far[..., :1] = 0
        return self.by_blocks(at - spilled) + far

    def back(self, distances: Bool[Tensor, "B H M"]) -> Bool[Tensor, "B H N M"]:
        """Blocks of keys that stand at these distances before a block of queries."""
        distance = self.own[..., None] - torch.arange(self.n_blocks, device=self.past.device)
        index = distance.clamp(min=0)[:, None].expand(-1, distances.shape[1], -1, -1)
        return distances[:, :, None].expand(-1, -1, index.shape[2], -1).gather(3, index) & (distance >= 0)[:, None]

    def seen(self) -> Bool[Tensor, "B 1 N M"]:
        """The blocks of keys that are not behind a block of queries."""
        return (torch.arange(self.n_blocks, device=self.past.device) <= self.own[..., None])[:, None]

    def blocks_alike(self) -> Float[Tensor, "B H N M"]:
        """What the mean query of a block would attend to, if a block of keys were its mean; nothing where it has no queries."""
        logits = self.logits(self.mean_queries, self.mean_keys).masked_fill(~self.seen(), -torch.inf)
        return torch.where(self.asking[:, None, :, None], logits.softmax(-1), 0)


class BlockPrefill(PrefillPolicy):
    """A policy that chooses blocks of keys for blocks of queries, and columns. A block's own keys are always read."""

    block_size: int

    @abstractmethod
    def choose(self, prompt: Prompt) -> Choice:
        """What is read."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: Tensor, lengths: Tensor | None, softmax: Softmax) -> Tensor:
        if 0 in q.shape[:2]:
            return q.new_zeros(*q.shape[:3], v.shape[3])
        with torch.no_grad():
            choice = self.choose(Prompt(q, k, past, lengths, softmax, self.block_size))
        return block_sparse(q, k, v, choice.blocks, past, self.block_size, softmax, choice.columns)


def largest(x: Shaped[Tensor, "*R n"], count: Int[Tensor, "*#R"]) -> Bool[Tensor, "*R n"]:
    """So many of largest value; of equal ones the first."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter(-1, order, torch.arange(x.shape[-1], device=x.device).expand_as(order))
    return rank < count[..., None]


def smallest_set(
    mass: Float[Tensor, "*R n"], share: float, always: Bool[Tensor, "*#R n"] | None = None
) -> Bool[Tensor, "*R n"]:
    """The fewest that hold this share of the sum, beside those that are always taken; at share 1 all."""
    if share >= 1:
        return torch.ones_like(mass, dtype=torch.bool)
    mass = mass.double()  # a long running sum
    always = torch.zeros_like(mass, dtype=torch.bool) if always is None else always.expand_as(mass)
    order = mass.masked_fill(always, torch.inf).argsort(dim=-1, descending=True, stable=True)
    ordered = mass.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    return torch.empty_like(always).scatter(-1, order, before < share * mass.sum(-1, keepdim=True)) | always


def share_of_one(name: str, argument: str | None, default: float) -> float:
    """The argument as a share. Raises InputError when it is not one."""
    if argument is None:
        return default
    try:
        share = float(argument)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"the policy {name} takes a share above 0 and up to 1, as {name}:{default}; got {argument!r}")
    return share
