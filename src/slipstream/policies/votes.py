r"""How much of the attention of some queries keys get: what decides which of them are kept.

    vote_s = sum_h sum_t softmax_s(l_ht)        over the query heads that a key head serves, and the queries that vote

A prompt's votes are summed in tiles, each made twice: once for the denominators, once for the sums. Never T x T. They are
those of dense attention, whichever way the prompt itself was read, and have no gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.ops.softmax import Softmax, logits_of

QUERIES, KEYS = 256, 1024  # of a tile


@torch.no_grad()
def votes(
    q: Float[Tensor, "B T H K"], k: Float[Tensor, "B S G K"], ends: Int[Tensor, "B T"], softmax: Softmax
) -> Float[Tensor, "B S G"]:
    """A query sees the keys before its end, and with end 0 does not vote, whatever it holds."""
    total = k.new_zeros(*k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32))
    for i in range(0, q.shape[1] if len(q) else 0, QUERIES):
        rows, until = q[:, i : i + QUERIES], ends[:, i : i + QUERIES]
        tiles = [slice(j, j + KEYS) for j in range(0, int(until.max()), KEYS)]
        log_total = _log_total(rows, k, until, tiles, softmax)
        for tile in tiles:
            total[:, tile] += _shares(_logits(rows, k[:, tile], softmax), log_total, _seen(until, k, tile))
    return total


@torch.no_grad()
def votes_of_one(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B S G K"],
    log_total: Float[Tensor, "B 1 H"],
    seen: Bool[Tensor, "B S G"],
    softmax: Softmax,
) -> Float[Tensor, "B S G"]:
    """Those of one query whose denominator is known, over some of the keys that it read. Static shapes."""
    total = _by_groups(log_total, k.shape[2])
    return _shares(_logits(q, k, softmax), total, seen.transpose(1, 2)[:, :, None, None])


def with_sinks_counted(log_total: Float[Tensor, "B T H"], softmax: Softmax) -> Float[Tensor, "B T H"]:
    """The whole denominator, of what the keys alone make."""
    return log_total if softmax.sinks is None else torch.logaddexp(log_total, softmax.sinks.to(log_total.dtype))


def _log_total(q: Tensor, k: Tensor, ends: Tensor, tiles: list[slice], softmax: Softmax) -> Float[Tensor, "B G R t"]:
    wide = torch.promote_types(q.dtype, torch.float32)
    total = q.new_full((len(q), q.shape[1], q.shape[2]), -torch.inf, dtype=wide)
    total = _by_groups(with_sinks_counted(total, softmax), k.shape[2])
    for tile in tiles:
        logits = _logits(q, k[:, tile], softmax).masked_fill(~_seen(ends, k, tile), -torch.inf)
        total = torch.logaddexp(total, logits.logsumexp(-1))
    return total


def _logits(q: Tensor, k: Tensor, softmax: Softmax) -> Float[Tensor, "B G R t s"]:
    return logits_of(q, k, softmax).unflatten(1, (k.shape[2], -1))


def _seen(ends: Tensor, k: Tensor, tile: slice) -> Bool[Tensor, "B 1 1 t s"]:
    places = torch.arange(k.shape[1], device=k.device)[tile]
    return (places < ends[..., None])[:, None, None]


def _shares(logits: Tensor, log_total: Tensor, seen: Tensor) -> Float[Tensor, "B s G"]:
    """Masked after the exponential too: a query that does not vote has no denominator."""
    return (logits - log_total[..., None]).exp().masked_fill(~seen, 0).sum((2, 3)).transpose(1, 2)


def _by_groups(x: Float[Tensor, "B T H"], groups: int) -> Float[Tensor, "B G R T"]:
    return x.transpose(1, 2).unflatten(1, (groups, -1))
