r"""Attention to the past in summary: one key and value for every stretch of l tokens, a new stretch every d tokens.

    o_t = sum_{i : i d + l <= t + 1} softmax_i(scale * q_t . k_i) v_i        k_i, v_i of tokens i d ... i d + l - 1

A summary is seen once its last token is there. How a stretch becomes a summary is the caller's: `stretches` gives him those
that end within a call, whatever cut they began before. `rank` turns weights into scores of blocks of tokens (Yuan et al. 2025,
arXiv:2502.11089, eq. 9, whose numbers count from 1): every d tokens of a block gain the weights of all summaries that hold
them. T x T / d weights are never held at once: queries go tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.ops.choice_loss import weights
from slipstream.ops.chosen_attention import TOGETHER, choose, wanted_by_any
from slipstream.ops.places import cut_out
from slipstream.ops.recompute import recomputed
from slipstream.ops.softmax import PLAIN, Softmax, logits_of, read, read_with_lse

QUERIES = 512  # that meet summaries at once


class Stretch(NamedTuple):
    """Tokens of one summary, and tokens from one's begin to the next's: stride divides length."""

    length: int
    stride: int

    def whole(self, tokens: int) -> int:
        """How many stretches have ended within the first tokens."""
        return max(0, (tokens - self.length) // self.stride + 1)

    def ended(self, tokens: Int[Tensor, "*B"]) -> Int[Tensor, "*B"]:
        """The same of every row."""
        return ((tokens - self.length) // self.stride + 1).clamp(min=0)


def stretches(
    line: Float[Tensor, "B L G K"], past: Int[Tensor, "B"], stretch: Stretch, lengths: Int[Tensor, "B"] | None = None
) -> tuple[Float[Tensor, "B N l G K"], Int[Tensor, "B"], Int[Tensor, "B"]]:
    """The tokens of stretches that end in this call, the number of the first, and how many of the N really end.

    line: the l - 1 tokens before this call, then its own.
    """
    length, stride = stretch
    tokens = line.shape[1] - length + 1
    first = stretch.ended(past)
    count = stretch.ended(past + (tokens if lengths is None else lengths)) - first
    most = -(-tokens // stride)
    held = cut_out(line, first * stride - past + length - 1, max(0, (most - 1) * stride + length))
    if not most:
        return line.new_zeros(len(line), 0, length, *line.shape[2:]), first, count
    return held.unfold(1, length, stride).movedim(-1, 2), first, count


def summaries_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    v: Float[Tensor, "B N G V"],
    past: Int[Tensor, "B"],
    stretch: Stretch,
    softmax: Softmax = PLAIN,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """What is read of summaries laid out by number, without the sinks, and the logarithm of its denominator."""
    outputs = [(q.new_zeros(len(q), 0, q.shape[2], v.shape[3]), q.new_zeros(len(q), 0, q.shape[2]))]
    for rows, positions, end in _tiles(q, past, k.shape[1] * stretch.stride, QUERIES):
        n = min(k.shape[1], stretch.whole(end))
        mask = _seen(positions, stretch, n)[:, None]
        outputs.append(recomputed(read_with_lse, q[:, rows], k[:, :n], v[:, :n], mask, softmax))
    o, lse = (torch.cat(parts, 1) for parts in zip(*outputs))
    return o, lse


def window_and_summaries(
    q: Float[Tensor, "B T H K"],
    line: Float[Tensor, "B L 1 K"],
    summaries: Float[Tensor, "B N 1 K"],
    past: Int[Tensor, "B"],
    window: int,
    every: int,
    chosen: Int[Tensor, "B T 1 n"] | None = None,
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "B T H K"]:
    """One softmax over the last `window` tokens and over summaries of every so many: those chosen, or all that are seen.

    What is met is also what is read. line: the window - 1 tokens before this call, then its own.
    """
    outputs = [q[:, :0]]
    for rows, positions, end in _tiles(q, past, summaries.shape[1] * every, TOGETHER):
        i, t = rows.start, rows.stop - rows.start
        near = _near(i, t, window, past)
        far, wanted = summaries[:, : end // every], None
        met = _seen(positions, Stretch(every, every), far.shape[1])
        if chosen is not None:
            by_groups, wanted = wanted_by_any(chosen[:, rows], far.shape[1], min(far.shape[1], t * chosen.shape[3]))
            met = by_groups[:, 0]
        keys = line[:, i : i + t + window - 1]
        outputs.append(
            recomputed(_read_both, q[:, rows], keys, far, torch.cat([near, met], -1)[:, None], wanted, softmax)
        )
    return torch.cat(outputs, 1)


def weights_of_summaries(
    q: Float[Tensor, "B t H K"],
    positions: Int[Tensor, "B t"],
    line: Float[Tensor, "B L 1 K"],
    summaries: Float[Tensor, "B N 1 K"],
    past: Int[Tensor, "B"],
    window: int,
    every: int,
    softmax: Softmax = PLAIN,
) -> tuple[Float[Tensor, "B H t N"], Bool[Tensor, "B 1 t N"]]:
    """What a tile of queries would give to all summaries that are seen, beside the window; and which these are."""
    i, t = int(positions[0, 0] - past[0]), q.shape[1]
    seen = _seen(positions, Stretch(every, every), summaries.shape[1])
    keys = torch.cat([line[:, i : i + t + window - 1], summaries], 1)
    met = torch.cat([_near(i, t, window, past).expand(len(q), -1, -1), seen], -1)
    return weights(q, keys, met[:, None], softmax)[..., t + window - 1 :], seen[:, None]


def _near(i: int, t: int, window: int, past: Int[Tensor, "B"]) -> Bool[Tensor, "B t S"]:
    """Which of the t + window - 1 tokens up to the last of t queries, the first of which is number i, each meets."""
    key = torch.arange(i + 1 - window, i + t, device=past.device)
    query = torch.arange(i, i + t, device=past.device)[:, None]
    return (key <= query) & (key > query - window) & (key >= -past[:, None, None])


def _read_both(q: Tensor, near: Tensor, far: Tensor, mask: Tensor, wanted: Tensor | None, softmax: Softmax) -> Tensor:
    if wanted is not None:
        far = torch.take_along_dim(far, wanted[..., None, None], 1)
    keys = torch.cat([near, far], 1)
    return read(q, keys, keys, mask, softmax)


def window_and_summaries_flops(
    T: int,
    B: int,
    H: int,
    K: int,
    window: int,
    every: int,
    mode: Literal["forward", "prefill", "step"],
    n: int | None = None,
) -> float:
    """Flops over T first tokens, or for one after T; no two queries of a tile choose the same n."""
    if mode == "step":
        return 4.0 * B * H * K * (window + min((T + 1) // every, n or T + 1))
    ends = [min(T, i + TOGETHER) for i in range(0, T, TOGETHER)]
    tiles = [(end - i, end // every) for i, end in zip([0, *ends], ends)]
    return 4.0 * B * H * K * sum(t * (t + window - 1 + min(far, t * (n or far))) for t, far in tiles)


def rank(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    past: Int[Tensor, "B"],
    stretch: Stretch,
    block_size: int,
    top_k: int,
) -> Int[Tensor, "B T G n"]:
    """The top_k blocks for each key head: the first, a query's own, the one before, and those of largest weight.

    Weights are those that summaries_attention reads by, summed over the query heads of a key head.
    """
    q, k, groups = q.detach(), k.detach(), k.shape[2]
    chosen = [torch.zeros(len(q), 0, groups, top_k, dtype=torch.long, device=q.device)]
    for rows, positions, end in _tiles(q, past, k.shape[1] * stretch.stride, QUERIES):
        n = min(k.shape[1], stretch.whole(end))
        unseen = ~_seen(positions, stretch, n)[:, None]
        logits = logits_of(q[:, rows], k[:, :n], PLAIN).unflatten(1, (groups, -1))  # B G R t N
        shares = logits.masked_fill(unseen[:, None], torch.finfo(logits.dtype).min).softmax(-1)
        shares = shares.sum(2).masked_fill(unseen, 0)  # also where a query sees none
        scores = _of_blocks(shares, stretch, block_size, -(-end // block_size)).transpose(1, 2)
        own = (positions // block_size)[:, :, None, None]
        block = torch.arange(scores.shape[3], device=q.device)
        scores = scores.masked_fill((block == 0) | (block == own) | (block == own - 1), torch.inf)
        chosen.append(choose(scores, block <= own, top_k))
    return torch.cat(chosen, 1)


def _of_blocks(
    weights: Float[Tensor, "*B N"], stretch: Stretch, block_size: int, blocks: int
) -> Float[Tensor, "*B blocks"]:
    """Every stride of tokens gains the weights of all summaries that hold it; a block, those of its strides."""
    per_stride, per_block = stretch.length // stretch.stride, block_size // stretch.stride
    padded = F.pad(weights, (per_stride - 1, blocks * per_block - weights.shape[-1]))
    return padded.unfold(-1, per_stride, 1).sum(-1).unflatten(-1, (blocks, per_block)).sum(-1)


def _tiles(q: Tensor, past: Tensor, room: int, together: int) -> Iterator[tuple[slice, Int[Tensor, "B t"], int]]:
    """Queries that are read together, their positions, and the tokens that may be seen by the last of them."""
    whole = torch.compiler.is_compiling()  # reading only what is filled costs a synchronisation
    furthest = 0 if whole or not len(past) else int(past.max())
    for i in range(0, q.shape[1], together):
        until = min(q.shape[1], i + together)
        positions = past[:, None] + torch.arange(i, until, device=q.device)
        yield slice(i, until), positions, room if whole else furthest + until


def _seen(positions: Int[Tensor, "B t"], stretch: Stretch, n: int) -> Tensor:
    return torch.arange(n, device=positions.device) < stretch.ended(positions + 1)[..., None]


def summaries_flops(
    T: int, B: int, H: int, K: int, V: int, stretch: Stretch, mode: Literal["forward", "prefill", "step"]
) -> float:
    """Flops of summaries_attention over T first tokens, or for one after T; of rank, with V = 0."""
    if mode == "step":
        return 2.0 * B * H * (K + V) * stretch.whole(T + 1)
    ends = [min(T, i + QUERIES) for i in range(0, T, QUERIES)]
    pairs = sum((end - i) * stretch.whole(end) for i, end in zip([0, *ends], ends))
    return 2.0 * B * H * (K + V) * pairs


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B N G K"],
    v: Float[Tensor, "B N G V"],
    stretch: Stretch,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H N"]]:
    """The definition, query by query, over the first T tokens: outputs, and the weights."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    outputs, weights = [], []
    for t in range(q.shape[1]):
        n = stretch.whole(t + 1)
        p = (torch.einsum("bhk,bnhk->bhn", q[:, t], k[:, :n]) / q.shape[3] ** 0.5).softmax(-1)
        outputs.append(torch.einsum("bhn,bnhv->bhv", p, v[:, :n]))
        weights.append(F.pad(p, (0, k.shape[1] - n)))
    return torch.stack(outputs, 1), torch.stack(weights, 1)
