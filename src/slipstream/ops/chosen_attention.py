r"""Softmax attention of every query over keys that it has chosen: single tokens, or whole blocks of them.

    o_t = sum_{s in G(t)} softmax_s(scale * q_t . k_s) v_s        G(t) = {s <= t : t chose s, or the block that s stands in}

A choice is made once for a group of query heads: chosen (B T C n) holds n positions, or numbers of blocks, -1 for none, and
none twice. Chosen one by one and moved for every query alone, keys cost far more than their products. So blocks are read the
other way round, as FlashMoBA does (Xiao et al. 2025, arXiv:2511.11571): the queries that chose a block are gathered, so that
its keys move once for many and are met by a dense product; what a query read in its blocks is merged by the logarithms of
the denominators. And tokens are read by a few queries together, which meet, under a mask, what any of them chose. Both are
made again for the gradient, a tile of queries at a time. Only a step gathers what its one query chose.

A choice has no gradient: what is read has. Who is chosen is decided by `choose`, which looks at scores and never at an order
that a sort happens to give: of equal scores the earliest position wins, in every mode.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.ops.dispatch import operator
from slipstream.ops.recompute import recomputed
from slipstream.ops.softmax import PLAIN, Softmax, merge, read, read_with_lse, with_sinks
from slipstream.ops.valid import zero_padding

QUERIES = 1024  # queries whose blocks are read at once
TOGETHER = 64  # queries that meet together the tokens that any of them chose
SCORES = 2**22  # products of queries and indexed keys that are held at once


def choose(scores: Float[Tensor, "B T C S"], seen: Bool[Tensor, "#B #T #C S"], n: int) -> Int[Tensor, "B T C n"]:
    """The n of largest score among those seen, by position; of equal scores the earliest; -1 where fewer are seen."""
    scores, seen = scores.masked_fill(~seen, -torch.inf), seen.expand_as(scores)
    last = scores.topk(min(n, scores.shape[-1])).values[..., -1:]
    above, equal = scores > last, scores == last
    wanted = n - above.sum(-1, keepdim=True)
    taken = (above | equal & (equal.cumsum(-1) <= wanted)) & seen
    place = torch.where(taken, taken.cumsum(-1) - 1, n)  # those not taken go to one more place, which is cut off
    positions = torch.arange(scores.shape[-1], device=scores.device).expand_as(place)
    return place.new_full((*place.shape[:-1], n + 1), -1).scatter(-1, place, positions)[..., :n]


def nearest_blocks(
    q: Float[Tensor, "B T H K"],
    sums: Float[Tensor, "B N G K"],
    past: Int[Tensor, "B"],
    block_size: int,
    n: int,
) -> Int[Tensor, "B T H n"]:
    """A query's own block, and the n - 1 whole ones before it whose mean key has the largest product with the query.

    sums: of the keys of each block, as block_sums keeps them.
    """
    chosen = [torch.zeros(*q.shape[:1], 0, q.shape[2], n, dtype=torch.long, device=q.device)]
    wide, groups = torch.promote_types(q.dtype, torch.float32), sums.shape[2]
    whole = torch.compiler.is_compiling()  # scoring only what is filled costs a synchronisation
    furthest = 0 if whole else _furthest(past)
    for i in range(0, q.shape[1], QUERIES):
        rows = q[:, i : i + QUERIES].detach()
        own = (past[:, None] + torch.arange(i, i + rows.shape[1], device=q.device)) // block_size
        means = (
            sums.detach()[:, : None if whole else _blocks_until(furthest + i + rows.shape[1], block_size)] / block_size
        )
        rows = rows.to(wide).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # B G R t K
        scores = (rows @ means.to(wide).permute(0, 2, 3, 1)[:, :, None]).flatten(1, 2).transpose(1, 2)
        block = torch.arange(means.shape[1], device=q.device)
        scores = scores.masked_fill((block == own[..., None])[:, :, None], torch.inf)
        chosen.append(choose(scores, (block <= own[..., None])[:, :, None], n))
    return torch.cat(chosen, 1)


def indexed_tokens(
    q: Float[Tensor, "B T I K"],
    weights: Float[Tensor, "B T I"],
    k: Float[Tensor, "B S K"],
    past: Int[Tensor, "B"],
    n: int,
    every: int = 1,
) -> Int[Tensor, "B T 1 n"]:
    """The n tokens up to each query of largest sum_i w_i relu(q_i . k_s): DeepSeek's lightning indexer (arXiv:2512.02556).

    every: k holds one key for so many tokens, which is seen from the last of them on.
    """
    q, weights, k, whole = q.detach(), weights.detach(), k.detach(), torch.compiler.is_compiling()
    chosen = [torch.zeros(len(q), 0, 1, n, dtype=torch.long, device=q.device)]
    furthest = 0 if whole else _furthest(past)
    together = q.shape[1] if whole else max(1, SCORES // max(1, q.shape[2] * k.shape[1]))
    for i in range(0, q.shape[1], max(1, together)):
        until = min(q.shape[1], i + together)
        keys = k if whole else k[:, : (furthest + until) // every]
        scores = index_scores(q[:, i:until], weights[:, i:until], keys)[:, :, None]
        position = past[:, None] + torch.arange(i, until, device=q.device)
        seen = torch.arange(keys.shape[1], device=q.device) < ((position + 1) // every)[..., None]
        chosen.append(choose(scores.to(torch.promote_types(scores.dtype, torch.float32)), seen[:, :, None], n))
    return torch.cat(chosen, 1)


def index_scores(
    q: Float[Tensor, "B t I K"], weights: Float[Tensor, "B t I"], k: Float[Tensor, "B S K"]
) -> Float[Tensor, "B t S"]:
    """sum_i w_i relu(q_i . k_s)."""
    return (weights[:, :, None] @ (q @ k.mT[:, None]).relu())[:, :, 0]


def indexed_flops(
    T: int, B: int, heads: int, K: int, mode: Literal["forward", "prefill", "step"], every: int = 1
) -> float:
    """Flops of indexed_tokens over T first tokens (about, where those seen grow within a tile), or for one after T."""
    if mode == "step":
        return 2.0 * B * heads * (K + 1) * ((T + 1) // every)
    together = max(1, SCORES // max(1, heads * (T // every)))
    pairs = T * (T // every) if together >= T else T * (T + together) / (2 * every)
    return 2.0 * B * heads * (K + 1) * pairs


def block_sums(
    sums: Float[Tensor, "B N G K"],
    x: Float[Tensor, "B T G K"],
    past: Int[Tensor, "B"],
    block_size: int,
    lengths: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B N G K"]:
    """The sums over blocks of tokens, with new tokens added. The sums are consumed: written in place where no gradient needs it."""
    x = zero_padding(x, lengths).to(sums.dtype)
    block = (past[:, None] + torch.arange(x.shape[1], device=x.device)) // block_size
    rows = torch.arange(len(past), device=x.device)[:, None]
    if torch.is_grad_enabled() and (sums.requires_grad or x.requires_grad):
        return sums.index_put((rows, block), x, accumulate=True)
    return sums.index_put_((rows, block), x, accumulate=True)


def tokens_of(blocks: Int[Tensor, "B T C n"], block_size: int, positions: Int[Tensor, "B T"]) -> Int[Tensor, "B T C m"]:
    """The tokens that stand in chosen blocks, those behind the query's own position left out."""
    tokens = blocks[..., None] * block_size + torch.arange(block_size, device=blocks.device)
    outside = (blocks[..., None] < 0) | (tokens > positions[..., None, None, None])
    return tokens.masked_fill(outside, -1).flatten(3)


def chosen_tokens(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    chosen: Int[Tensor, "B T C n"],
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "B T H V"]:
    """Attention to chosen tokens, which stand at their positions in k and v; G divides C, and C divides H."""
    if 0 in q.shape[:2]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    outputs = []
    for i in range(0, q.shape[1], TOGETHER):
        rows = slice(i, i + TOGETHER)
        outputs.append(recomputed(_read_together, q[:, rows], k, v, chosen[:, rows], softmax))
    return torch.cat(outputs, 1)


def _read_together(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, softmax: Softmax) -> Tensor:
    """Tokens that any query of the tile chose, met by all of them, under a mask."""
    groups = k.shape[2]
    mask, token = wanted_by_any(chosen, k.shape[1], k.shape[1])
    row = torch.arange(len(k), device=q.device)[:, None, None]
    place = _places(k, row, token[..., None], torch.arange(groups, device=q.device), groups).flatten(1)
    keys, values = (_gathered(x, place).unflatten(1, (-1, groups)).squeeze(3) for x in (k, v))
    return read(q, keys, values, mask.repeat_interleave(q.shape[2] // chosen.shape[2], 1), softmax)


def wanted_by_any(
    chosen: Int[Tensor, "B t C n"], tokens: int, most: int
) -> tuple[Bool[Tensor, "B C t U"], Int[Tensor, "B U"]]:
    """The tokens that any query chose, and which of them each did; at most so many, which a captured graph always takes."""
    met = torch.zeros(*chosen.shape[:3], tokens + 1, dtype=torch.bool, device=chosen.device)
    met = met.scatter_(3, chosen.masked_fill(chosen < 0, tokens), True)[..., :tokens].transpose(1, 2)
    wanted = met.flatten(1, 2).any(1)
    if not torch.compiler.is_compiling():
        most = max(1, int(wanted.sum(1).max())) if len(chosen) else 1
    token = wanted.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    return met.gather(3, token[:, None, None].expand(-1, *met.shape[1:3], -1)), token


@operator()
def gathered_tokens(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    chosen: Int[Tensor, "B T C n"],
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "B T H V"]:
    """The same with n keys moved for every query, in static shapes and without synchronisation: for a single step."""
    B, t, C, _ = chosen.shape
    row, group = (torch.arange(size, device=q.device) for size in (B, C))
    place = _places(k, row[:, None, None, None], chosen.clamp(min=0), group[:, None], C).flatten(0, 2)
    mask = (chosen >= 0).flatten(0, 2)[:, None, None]
    heads = q.unflatten(2, (C, -1)).flatten(0, 2)[:, :, None]  # a query's heads are met by the same keys, like queries
    o, lse = read_with_lse(heads, _gathered(k, place), _gathered(v, place), mask, softmax)
    return with_sinks(o.reshape(B, t, -1, v.shape[3]), lse.reshape(B, t, -1), softmax)


def chosen_blocks(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    chosen: Int[Tensor, "B T C n"],
    past: Int[Tensor, "B"],
    block_size: int,
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "B T H V"]:
    """Attention to the tokens of chosen blocks that are not behind the query: chosen_tokens of tokens_of, made dense."""
    if 0 in q.shape[:2]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    outputs, furthest = [], _furthest(past)
    for i in range(0, q.shape[1], QUERIES):
        rows, end = slice(i, i + QUERIES), min(q.shape[1], i + QUERIES)
        positions = past[:, None] + torch.arange(i, end, device=q.device)
        together = tile_size(end - i, chosen.shape[3], _blocks_until(furthest + end, block_size))
        what = q[:, rows], k, v, chosen[:, rows], positions, block_size, together, softmax
        outputs.append(recomputed(_read_blocks, *what))
    return torch.cat(outputs, 1)


class Lists(NamedTuple):
    """Who reads a block: its pairs (a query's choice each), in tiles of M that belong to one block of one row and group."""

    owner: Int[Tensor, "N"]  # of a tile: (row * groups + group) * blocks + block
    pair: Int[
        Tensor, "N M"
    ]  # of a place in a tile: ((row * queries + query) * groups + group) * n + choice; -1 for none
    slot: Int[Tensor, "P"]  # of a pair: its place, counted over all tiles


def _lists(chosen: Int[Tensor, "B t C n"], blocks: int, together: int) -> Lists:
    B, _, C, _ = chosen.shape
    first = torch.arange(B * C, device=chosen.device).reshape(B, 1, C, 1) * blocks
    none = B * C * blocks
    owner, order = torch.where(chosen >= 0, first + chosen, none).flatten().sort(stable=True)
    count = owner.bincount(minlength=none + 1)
    rank = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner]
    tiles = -(-count // together)
    tiles[none] = 0
    tiles[0].clamp_(min=1)  # there is always a tile; choices of none point at it, and are masked
    place = (tiles.cumsum(0) - tiles)[owner] * together + rank
    place = torch.where(owner < none, place, 0)
    tile_owner = torch.arange(none + 1, device=owner.device).repeat_interleave(tiles)
    pair = torch.full((len(tile_owner) * together,), -1, device=owner.device)
    real = owner < none
    pair[place[real]] = order[real]
    return Lists(tile_owner, pair.unflatten(0, (-1, together)), torch.empty_like(place).scatter(0, order, place))


def _read_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    positions: Int[Tensor, "B t"],
    block_size: int,
    together: int,
    softmax: Softmax,
) -> Tensor:
    C, n, blocks = *chosen.shape[2:], -(-k.shape[1] // block_size)
    lists = _lists(chosen, blocks, together)
    line, first = lists.owner // blocks, lists.owner % blocks * block_size
    tokens = first[:, None] + torch.arange(block_size, device=q.device)
    place = _places(k, (line // C)[:, None], tokens.clamp(max=k.shape[1] - 1), (line % C)[:, None], C)
    keys, values = _gathered(k, place), _gathered(v, place)
    asking = lists.pair.clamp(min=0) // n
    heads = q.unflatten(2, (C, -1)).flatten(0, 2)
    R = heads.shape[1]
    queries = heads.index_select(0, asking.flatten()).unflatten(0, asking.shape).flatten(1, 2)
    at = positions.flatten()[asking // C].masked_fill(lists.pair < 0, -1)
    mask = (tokens[:, None] <= at[..., None]).repeat_interleave(R, 1)
    o, lse = read_with_lse(queries[:, :, None], keys, values, mask[:, None], softmax)
    o, lse = (x.reshape(-1, *x.shape[3:]).unflatten(0, (-1, R)).index_select(0, lists.slot) for x in (o, lse))
    lse = lse.masked_fill((chosen < 0).flatten()[:, None], -torch.inf)
    parts = zip(*(x.unflatten(0, chosen.shape).transpose(3, 4).flatten(2, 3).unbind(3) for x in (o, lse)))
    return with_sinks(*merge(list(parts)), softmax)


def _places(x: Float[Tensor, "B S G K"], row: Tensor, token: Tensor, group: Tensor, groups: int) -> Tensor:
    """Where tokens stand when rows, tokens and heads are counted as one; group: of so many groups of query heads."""
    return (row * x.shape[1] + token) * x.shape[2] + group * x.shape[2] // groups


def _gathered(x: Float[Tensor, "B S G K"], place: Int[Tensor, "N m"]) -> Float[Tensor, "N m 1 K"]:
    return x.flatten(0, 2).index_select(0, place.flatten()).unflatten(0, place.shape)[:, :, None]


def _blocks_until(end: int, block_size: int) -> int:
    return -(-end // block_size)


def _furthest(past: Int[Tensor, "B"]) -> int:
    return int(past.max()) if len(past) else 0


def tile_size(queries: int, n: int, blocks: int) -> int:
    """Pairs of a block that are read together: about half of what a block has, so that few places stay empty."""
    load = queries * min(n, blocks) // (2 * max(blocks, 1))
    return 1 << min(6, max(1, load).bit_length() - 1)


def gathered_flops(B: int, H: int, K: int, V: int, n: int) -> float:
    """Flops of gathered_tokens for one query; choices of none count."""
    return 2.0 * B * H * n * (K + V)


def tokens_flops(T: int, B: int, H: int, K: int, V: int, n: int) -> float:
    """Flops of chosen_tokens over T first tokens, where no two queries of a tile choose alike: the most there can be."""
    ends = [min(T, i + TOGETHER) for i in range(0, T, TOGETHER)]
    pairs = sum((end - i) * min(end, (end - i) * n) for i, end in zip([0, *ends], ends))
    return 2.0 * B * H * (K + V) * pairs


def blocks_flops(T: int, B: int, H: int, K: int, V: int, C: int, n: int, block_size: int) -> float:
    """Flops of chosen_blocks over T first tokens that choose evenly: half a tile stays empty for every block."""
    pairs = 0.0
    for i in range(0, T, QUERIES):
        end = min(T, i + QUERIES)
        blocks = _blocks_until(end, block_size)
        pairs += (
            _pairs(end, n, block_size) - _pairs(i, n, block_size) + blocks * (tile_size(end - i, n, blocks) - 1) / 2
        )
    return 2.0 * B * H * pairs * block_size * (K + V)


def _pairs(T: int, n: int, block_size: int) -> int:
    """How many blocks the first T tokens choose, n each or all there are."""
    whole, rest = divmod(T, block_size)
    few = min(whole, n)
    return block_size * (few * (few + 1) // 2 + (whole - few) * n) + rest * min(whole + 1, n)


def nearest_flops(
    T: int, B: int, H: int, K: int, block_size: int, mode: Literal["forward", "prefill", "step"]
) -> float:
    """Flops of nearest_blocks over T first tokens, or for one after T."""
    if mode == "step":
        return 2.0 * B * H * K * _blocks_until(T + 1, block_size)
    ends = range(QUERIES, T + QUERIES, QUERIES)
    tiles = ((min(T, end) - end + QUERIES) * _blocks_until(min(T, end), block_size) for end in ends)
    return 2.0 * B * H * K * sum(tiles)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    chosen: Int[Tensor, "B T C n"],
    block_size: int = 1,
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "B T H V"]:
    """The definition, query by query, over the first T tokens."""
    H, outputs = q.shape[2], []
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    scale = softmax.scale_of(q.shape[3])
    for t in range(q.shape[1]):
        block = torch.arange(t + 1, device=q.device) // block_size
        met = (chosen[:, t, :, :, None] == block).any(2).repeat_interleave(H // chosen.shape[2], 1)
        logits = scale * torch.einsum("bhk,bshk->bhs", q[:, t], k[:, : t + 1])
        logits = logits if softmax.cap is None else softmax.cap * torch.tanh(logits / softmax.cap)
        logits = logits.masked_fill(~met, -torch.inf)
        if softmax.sinks is not None:
            logits = torch.cat([logits, softmax.sinks.expand(len(q), -1)[..., None]], -1)
        weights = logits.softmax(-1)[..., : t + 1]
        outputs.append(torch.einsum("bhs,bshv->bhv", weights, v[:, : t + 1]))
    return torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])
