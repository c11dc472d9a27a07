r"""Routing: every token picks k of E experts, and only what was picked is computed.

    e_t1 ... e_tk = the k largest of s_t = W_r x_t, of equal ones the lower number       w_ti = gate(s_t) at e_ti
    y_t = sum_i w_ti W_{e_ti} h_ti

What a token gets depends on that token alone. Choices are held in one of two ways with the same methods. `group` sorts them
by expert, for one product an expert: the work of whole sequences. `Gathered` takes each choice by itself, in static shapes
and without asking the host how many chose what: single steps. A choice of the number E or more is none: it is not computed,
and gives zeros; so a token may use fewer than k. Between `send` and `combine` stand rows, one a choice; a mixture of
feed-forwards is

    h = act(way.project(way.send(x), w_in))          y = way.combine(way.each(w[..., None]) * h, w_out)

Weights multiply the rows before the last product, on its narrow side. Weights of experts are stored (E O I), as those of
E linear layers. Whole sequences of gated networks have an op of their own, ops/expert_mlp.py; other rules of choice are in
ops/choose.py, and what balances experts in ops/balance.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.ops.expert_linear import expert_linear

Gate = Literal["softmax", "sigmoid"]


def router_logits(
    x: Float[Tensor, "*B D"], weight: Float[Tensor, "E D"], bias: Float[Tensor, "E"] | None = None
) -> Float[Tensor, "*B E"]:
    """The router's product, in float32 at least, under autocast too: a rounded score would pick another expert."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, weight, bias = x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)


def best(scores: Float[Tensor, "*B E"], k: int) -> Int[Tensor, "*B k"]:
    """Where the k largest scores stand, largest first; of equal ones, the first. Picks experts, or an expert's tokens."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def weigh(
    logits: Float[Tensor, "*B E"],
    chosen: Int[Tensor, "*B k"],
    gate: Gate,
    normalised: bool,
    idle: Bool[Tensor, "*B k"] | None = None,
) -> Float[Tensor, "*B k"]:
    """The weights of the chosen: of a softmax over all E, or each its sigmoid; normalised, they sum to one.

    Normalised weights are a softmax over the chosen alone, so that small ones are not divided by a sum of nothing. idle: which
    of the chosen weigh nothing and are not counted (all of them may).
    """
    log_weights = F.logsigmoid(logits) if gate == "sigmoid" else logits.log_softmax(-1)
    own = log_weights.gather(-1, chosen)
    if idle is None:
        return own.softmax(-1) if normalised else own.exp()
    own = own.masked_fill(idle, torch.finfo(own.dtype).min)
    return (own.softmax(-1) if normalised else own.exp()).masked_fill(idle, 0.0)


def dense(weights: Float[Tensor, "*B k"], chosen: Int[Tensor, "*B k"], n_experts: int) -> Float[Tensor, "*B E"]:
    """Weights by the number of their expert, zero for those that were not chosen."""
    room = weights.new_zeros(*weights.shape[:-1], n_experts + 1)
    return room.scatter(-1, chosen.clamp(max=n_experts), weights)[..., :n_experts]


def group(experts: Int[Tensor, "*B k"], n_experts: int) -> Grouped:
    """The choices sorted by expert, those of one expert by token; choices of none left out. Asks the host for the counts."""
    flat = experts.flatten()
    counts = torch.bincount(flat, minlength=n_experts).tolist()[:n_experts]
    return Grouped(flat.sort(stable=True).indices[: sum(counts)], counts, experts.shape)


@dataclass(frozen=True)
class Grouped:
    """Choices sorted by expert. places: of each in the order of tokens; counts: choices of each expert; shape: (*B k)."""

    places: Int[Tensor, "N"]
    counts: list[int]
    shape: torch.Size

    def send(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "N I"]:
        """Each token once for every expert it chose."""
        return x.flatten(0, -2).index_select(0, self._tokens())

    def each(self, h: Float[Tensor, "*B k I"]) -> Float[Tensor, "N I"]:
        """What every choice has of its own."""
        return h.flatten(0, -2).index_select(0, self.places)

    def back(self, rows: Float[Tensor, "N O"]) -> Float[Tensor, "*B k O"]:
        """Rows in the order of tokens and their choices: the inverse of each."""
        flat = rows.new_zeros(self.shape.numel(), rows.shape[-1]).index_copy(0, self.places, rows)
        return flat.reshape(*self.shape, rows.shape[-1])

    def project(self, rows: Float[Tensor, "N I"], weight: Float[Tensor, "E O I"]) -> Float[Tensor, "N O"]:
        """Each row by the weight of its expert."""
        return torch.cat([F.linear(own, w) for own, w in zip(rows.split(self.counts), weight.unbind())])

    def combine(self, rows: Float[Tensor, "N I"], weight: Float[Tensor, "E O I"]) -> Float[Tensor, "*B O"]:
        """Each row by the weight of its expert, summed over a token's choices, one expert after another."""
        y = rows.new_zeros(self.shape[:-1].numel(), weight.shape[1])
        parts = zip(self._tokens().split(self.counts), rows.split(self.counts), weight.unbind())
        for tokens, own, w in parts:
            y.index_add_(0, tokens, F.linear(own, w))
        return y.reshape(*self.shape[:-1], weight.shape[1])

    def _tokens(self) -> Int[Tensor, "N"]:
        return self.places // self.shape[-1]


@dataclass(frozen=True)
class Gathered:
    """Choices in the order of tokens: for few of them."""

    experts: Int[Tensor, "*B k"]

    def send(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B k I"]:
        return x[..., None, :].expand(*self.experts.shape, -1)

    def each(self, h: Float[Tensor, "*B k I"]) -> Float[Tensor, "*B k I"]:
        return h

    def back(self, rows: Float[Tensor, "*B k O"]) -> Float[Tensor, "*B k O"]:
        return rows

    def project(self, rows: Float[Tensor, "*B k I"], weight: Float[Tensor, "E O I"]) -> Float[Tensor, "*B k O"]:
        return expert_linear(rows, weight, self.experts)

    def combine(self, rows: Float[Tensor, "*B k I"], weight: Float[Tensor, "E O I"]) -> Float[Tensor, "*B O"]:
        return self.project(rows, weight).sum(-2)


Way = Grouped | Gathered


def route_flops(choices: int, d_in: int, d_out: int) -> float:
    """Of one product with so many choices (tokens times k); the router itself is a linear layer."""
    return 2.0 * choices * d_in * d_out
