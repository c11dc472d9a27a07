r"""Causal softmax attention where every block of queries has chosen blocks of keys, head by head.

    o_t = sum_{s in G(t)} softmax_s(scale * q_t . k_s) v_s
    G(t) = {s <= t : the block of t chose the block of s, or s is in the block of t, or s is a chosen column}

Blocks begin at positions that are multiples of their size, in every row, wherever its past ends. A column is a key that
every later query of the head reads; where its block was chosen too it counts once. Work goes with what is chosen: keys
are laid out block by block, the chosen ones gathered, and blocks of queries that read equally many are read together, under
one mask, by torch's own attention. Memory goes with the tokens and one such tile, made again for the gradient.

A choice has no gradient, what is read has. How one chooses is not said here: policies and mixers do that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.ops.recompute import recomputed
from slipstream.ops.softmax import PLAIN, Softmax, read

GATHERED = 2**15  # keys that are gathered at once


def blocks_of(past: Int[Tensor, "B"], tokens: int, block_size: int) -> tuple[Int[Tensor, "B N"], int]:
    """For each row, the numbers of the blocks in which new tokens can stand (a row's last may hold none), and how many
    blocks of keys there are in the longest row."""
    ends = past + tokens
    blocks, queries = (
        int(x.max()) if len(x) else 0 for x in (-(-ends // block_size), -(-ends // block_size) - past // block_size)
    )
    return (past // block_size)[:, None] + torch.arange(queries, device=past.device), blocks


def block_sparse(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    chosen: Bool[Tensor, "B C N M"],
    past: Int[Tensor, "B"],
    block_size: int,
    softmax: Softmax = PLAIN,
    columns: Bool[Tensor, "B C L"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """k and v are laid out by position, and q_t of row b stands at past_b + t. chosen[b, c, n, m]: whether the n-th block of
    row b's queries (counted as blocks_of does) reads the m-th block of keys; its own it always reads, later ones never.
    A choice is made for a group of query heads: G divides C, and C divides H."""
    if 0 in q.shape[:2]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    (B, C, N, M), T = chosen.shape, q.shape[1]
    lines, keys, values = q.unflatten(2, (C, -1)).flatten(0, 2), *(_in_blocks(x, M, block_size) for x in (k, v))
    sinks = None if softmax.sinks is None else softmax.sinks.unflatten(0, (C, -1))
    most = max(GATHERED, M * block_size + (0 if columns is None else columns.shape[2]))
    rooms = None if torch.is_grad_enabled() else _rooms((keys, values), most)
    parts, order = [], []
    for tile in _tiles(chosen, past, T, block_size, k.shape[2], columns):
        how = softmax if sinks is None else replace(softmax, sinks=sinks[tile.unit // N % C].flatten())
        parts.append(recomputed(_read_tile, lines, keys, values, tile, how, rooms))
        order.append(tile.unit)
    rank = torch.empty(B * C * N, dtype=torch.long, device=q.device)
    rank[torch.cat(order)] = torch.arange(sum(map(len, order)), device=q.device)
    place = past[:, None] + torch.arange(T, device=q.device)
    block = place // block_size - (past // block_size)[:, None]
    unit = rank.unflatten(0, (B, C, N)).gather(2, block[:, None].expand(-1, C, -1)).transpose(1, 2)
    index = unit * block_size + (place % block_size)[..., None]
    return torch.cat(parts).flatten(0, 1).index_select(0, index.flatten()).reshape(*q.shape[:3], -1)


class _Tile(NamedTuple):
    """Units that read equally many blocks. A unit is a block of queries of one row and one group of heads, numbered (B C N)."""

    unit: Int[Tensor, "n"]
    query: Int[Tensor, "n t"]  # its queries, numbered (B T C); any where the block has none
    block: Int[Tensor, "n c"]  # what it reads, numbered (B G M); its own last
    column: Int[Tensor, "n w"]  # beside these, numbered (B G M s)
    met: Bool[Tensor, "n w"]  # which of the columns are real


def _tiles(
    chosen: Bool[Tensor, "B C N M"],
    past: Int[Tensor, "B"],
    tokens: int,
    block_size: int,
    groups: int,
    columns: Bool[Tensor, "B C L"] | None,
) -> Iterator[_Tile]:
    (B, C, N, M), device = chosen.shape, past.device
    own = (past // block_size)[:, None] + torch.arange(N, device=device)
    real = own * block_size < (past + tokens)[:, None]
    block, within = torch.arange(M, device=device), torch.arange(block_size, device=device)
    earlier, itself = (f(block, own[..., None])[:, None] for f in (torch.lt, torch.eq))
    reads = ((chosen & earlier | itself) & real[:, None, :, None]).flatten(0, 2)
    count, pairs = reads.sum(-1), reads.nonzero()[:, 1]
    first, order = count.cumsum(0) - count, count.argsort(stable=True)
    listed = past.new_zeros(B * C, 0) if columns is None else _listed(columns[..., : M * block_size].flatten(0, 1))
    for blocks, units in zip(*(x.tolist() for x in count.unique(return_counts=True))):
        same, order = order[:units], order[units:]
        together = max(1, GATHERED // max(1, blocks * block_size + listed.shape[1]))
        for unit in same.split(together) if blocks else ():
            row, head, at = unit // (C * N), unit // N % C, own[unit // (C * N), unit % N]
            column, met = _unread(listed[unit // N], at, reads[unit], block_size)
            mine = pairs[first[unit, None] + torch.arange(blocks, device=device)]
            line = (row * groups + head * groups // C)[:, None] * M
            query = ((at * block_size - past[row])[:, None] + within).clamp(0, tokens - 1)
            query = (row[:, None] * tokens + query) * C + head[:, None]
            yield _Tile(unit, query, line + mine, line * block_size + column, met)


def _in_blocks(x: Float[Tensor, "B S G K"], blocks: int, block_size: int) -> Float[Tensor, "BGM s K"]:
    """Blocks of keys of all rows and groups, end to end, so that a block moves in one piece; the last is filled up."""
    missing = max(0, blocks * block_size - x.shape[1])
    x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x[:, : blocks * block_size]
    return x.unflatten(1, (blocks, -1)).permute(0, 3, 1, 2, 4).flatten(0, 2)


def _listed(columns: Bool[Tensor, "R S"]) -> Int[Tensor, "R m"]:
    """Where a row is true; -1 behind the last."""
    place = columns.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, : int(columns.sum(-1).amax())]
    return place.masked_fill(~columns.gather(1, place), -1)


def _unread(
    column: Int[Tensor, "n m"], own: Int[Tensor, "n"], reads: Bool[Tensor, "n M"], block_size: int
) -> tuple[Int[Tensor, "n w"], Bool[Tensor, "n w"]]:
    """The columns before a unit's own block whose block it does not read, to the left; and which these are."""
    if not column.shape[1]:
        return column, column >= 0
    block = column.clamp(min=0) // block_size
    met = (column >= 0) & (block < own[:, None]) & ~reads.gather(1, block)
    place = met.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, : int(met.sum(-1).amax())]
    return column.gather(1, place).clamp(min=0), met.gather(1, place)


def _rooms(tables: tuple[Tensor, Tensor], tokens: int) -> list[Tensor]:
    """Where keys are gathered, tile after tile: memory that is new for each costs as much as the gathering."""
    return [x.new_empty(tokens, x.shape[2]) for x in tables]


def _gathered(x: Float[Tensor, "BGM s K"], tile: _Tile, room: Tensor | None) -> Float[Tensor, "n m K"]:
    """Columns, then blocks, of all units of a tile. Beside columns blocks are gathered token by token too, in one go."""
    block, column = tile.block, tile.column
    if column.shape[1]:
        tokens = (block[..., None] * x.shape[1] + torch.arange(x.shape[1], device=x.device)).flatten(1)
        x, index = x.flatten(0, 1), torch.cat([column, tokens], 1).flatten()
    else:
        index = block.flatten()
    rows = len(index) * x.shape[1:-1].numel()
    to = None if room is None else room[:rows].view(-1, *x.shape[1:])
    return torch.index_select(x, 0, index, out=to).reshape(len(block), -1, x.shape[-1])


def _read_tile(
    lines: Float[Tensor, "BTC R K"],
    keys: Float[Tensor, "BGM s K"],
    values: Float[Tensor, "BGM s V"],
    tile: _Tile,
    softmax: Softmax,
    rooms: list[Tensor] | None,
) -> Float[Tensor, "n t R V"]:
    """Units are laid side by side as heads are. All queries see the same of the blocks, so that one mask serves all units."""
    (n, t), R, w = tile.query.shape, lines.shape[1], tile.met.shape[1]
    place = torch.arange(t, device=lines.device)
    mask = (torch.cat([place.new_zeros((tile.block.shape[1] - 1) * t), place]) <= place[:, None])[None, None]
    k, v = (_gathered(x, tile, room) for x, room in zip((keys, values), rooms or (None, None)))
    if w:
        met = tile.met.repeat_interleave(R, 0)[None, :, None].expand(-1, -1, t, -1)
        mask = torch.cat([met, mask.expand(-1, n * R, -1, -1)], -1)
    q = lines.index_select(0, tile.query.flatten()).reshape(n, t, R, -1).transpose(0, 1).flatten(1, 2)
    o = read(q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], mask, softmax)
    return o[0].unflatten(1, (n, R)).transpose(0, 1)


def block_sparse_flops(blocks: int, block_size: int, K: int, V: int, columns: int = 0) -> float:
    """Flops of so many blocks read, those of columns gathered for a block of queries counted beside; masked pairs count."""
    return 2.0 * block_size * (blocks * block_size + columns) * (K + V)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    chosen: Bool[Tensor, "B C N M"],
    past: Int[Tensor, "B"],
    block_size: int,
    softmax: Softmax = PLAIN,
    columns: Bool[Tensor, "B C L"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """The definition, query by query."""
    H, outputs = q.shape[2], []
    scale = softmax.scale_of(q.shape[3])
    for b, first in enumerate(past.tolist()):
        for t in range(q.shape[1]):
            seen, own = first + t + 1, (first + t) // block_size
            block = torch.arange(seen, device=q.device) // block_size
            met = chosen[b, :, own - first // block_size][:, block] | (block == own)
            met = met if columns is None else met | columns[b, :, :seen]
            met = met.repeat_interleave(H // len(met), 0)
            keys, values = (x[b, :seen].repeat_interleave(H // x.shape[2], 1) for x in (k, v))
            logits = softmax.capped(scale * torch.einsum("hk,shk->hs", q[b, t], keys))
            weights = logits.masked_fill(~met, -torch.inf)
            if softmax.sinks is not None:
                weights = torch.cat([weights, softmax.sinks[:, None]], 1)
            outputs.append(torch.einsum("hs,shv->hv", weights.softmax(-1)[:, :seen], values))
    return torch.stack(outputs).unflatten(0, (len(q), -1)) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])
