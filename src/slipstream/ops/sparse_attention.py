r"""Softmax attention over an index set: in tiles, with memory of one tile at a time, forward and backward.

    o_t = sum_{s in G(t)} softmax_s(scale * q_t . k_s) v_s        G(t) = {s <= t : the set says that t sees s}

Keys and queries of a tile are gathered by position; a tile is read whole (ops/softmax), and made again for its gradient.
Where queries stand alike in all members of a set, each has one tile; where they do not, its tiles are merged. Work is
`index_tiles.pairs` for each head. A pattern by heads is one call for every group of heads that share a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.ops.index_sets import IndexSet
from slipstream.ops.index_tiles import Group, Tile, groups, pairs, tiles
from slipstream.ops.softmax import PLAIN, Softmax, merge, read, read_with_lse, with_sinks
from slipstream.ops.tile_reads import ReadTile, TilePlaces, read_tiles, take


def sparse_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    index_set: IndexSet,
    past: Int[Tensor, "B"],
    first: Int[Tensor, "B"] | None = None,
    kept: int = 0,
    lengths: Int[Tensor, "B"] | None = None,
    causal: bool = True,
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "B T H V"]:
    """q_t of row b stands at position past_b + t; G key heads serve H query heads.

    k and v are laid out by position; or they begin at position first_b, behind the `kept` first tokens, which stay at their
    places. Whatever is seen must be there. lengths matter only to causal=False: what the row's tokens see, ends with them.
    """
    if softmax.sinks is None and len(found := groups(index_set, q.shape[1])) == 1:

        def read_tile(q: Tensor, k: Tensor, v: Tensor, meets: Tensor) -> tuple[Tensor, ...]:
            return (read(q, k, v, meets, softmax),)

        return over_tiles(read_tile, q, k, v, found[0], past, first, kept, lengths, causal)[0]
    parts = read_set(q, k, v, index_set, past, first, kept, lengths, causal, softmax)
    return with_sinks(*parts, softmax)


def read_set(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    index_set: IndexSet,
    past: Int[Tensor, "B"],
    first: Int[Tensor, "B"] | None = None,
    kept: int = 0,
    lengths: Int[Tensor, "B"] | None = None,
    causal: bool = True,
    softmax: Softmax = PLAIN,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """The same without the sinks, with the logarithms of the denominators (-inf: nothing seen), to be merged with others."""

    def read_tile(q: Tensor, k: Tensor, v: Tensor, meets: Tensor) -> tuple[Tensor, ...]:
        return read_with_lse(q, k, v, meets, softmax)

    parts = []
    for group in groups(index_set, q.shape[1]):
        o, lse = over_tiles(read_tile, q, k, v, group, past, first, kept, lengths, causal)
        parts.append((o, lse))
    return parts[0] if len(parts) == 1 else merge(parts)


def over_tiles(
    read_tile: ReadTile,
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G L"],
    v: Float[Tensor, "B S G V"],
    group: Group,
    past: Int[Tensor, "B"],
    first: Int[Tensor, "B"] | None = None,
    kept: int = 0,
    lengths: Int[Tensor, "B"] | None = None,
    causal: bool = True,
    meets: Callable[[Tile], Int[Tensor, "R N n m"]] | None = None,
    shared: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """What read_tile(q, k, v, meets, *shared) gives, over all tiles of a group. meets: what it is told of a tile's pairs, if
    not which of them meet.

    Rows whose pasts are alike share their positions, and stand beside each other as heads do.
    """
    (T, H), S = q.shape[1:3], k.shape[1]
    if 0 in q.shape[:2]:
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -torch.inf)
    ends, end = None if lengths is None else past + lengths, S if first is None else S + T
    if not torch.compiler.is_compiling() and (T > 1 or not group.bounded):
        end = int(past.max()) + T
        if T > 1 and lengths is None and _alike(past) and (first is None or _alike(first)):
            past, first = past[:1], None if first is None else first[:1]

    def places() -> Iterator[TilePlaces]:
        for tile in tiles(group, past, T, end, causal, ends):
            yield (
                *_places(tile, past, T, S, first, kept),
                (tile.meets if meets is None else meets(tile)).flatten(0, 1)[:, None],
            )

    R = len(past)
    q, k, v = _side_by_side(q, R), _side_by_side(k, R), _side_by_side(v, R)
    if T == 1:
        ((_, keys, met),) = places()
        outputs = read_tile(q.transpose(0, 1), take(k, keys), take(v, keys), met, *shared)
        return tuple(x.unflatten(2, (-1, H))[:, 0] for x in outputs)
    q = F.pad(q, (0, 0, 0, 0, 0, 1))  # a last one that stands for queries which are none
    outputs = read_tiles(places, read_tile, q, k, v, *shared)
    return tuple(x[0, :-1].unflatten(0, (R, T)).unflatten(2, (-1, H)).transpose(1, 2).flatten(0, 1) for x in outputs)


def _alike(x: Int[Tensor, "B"]) -> bool:
    return bool((x == x[0]).all())


def _side_by_side(x: Float[Tensor, "B L H K"], R: int) -> Float[Tensor, "1 RL bH K"]:
    """B rows as R, in each of which those that share positions are heads; all rows in one line."""
    return x.unflatten(0, (R, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)[None]


def _places(tile: Tile, past: Tensor, T: int, S: int, first: Tensor | None, kept: int) -> tuple[Tensor, Tensor]:
    """Where a tile's queries and keys stand in lines of R rows, R * T and R * S long."""
    row = torch.arange(len(past), device=past.device)[:, None, None]
    queries = torch.where(tile.queries < 0, len(past) * T, row * T + tile.queries - past[:, None, None])
    keys = tile.keys
    if first is not None:
        keys = torch.where(keys < kept, keys, keys - first[:, None, None] + kept)
    keys = row * S + keys.clamp(0, S - 1)
    return queries.flatten(0, 1), keys.flatten(0, 1)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    index_set: IndexSet,
    causal: bool = True,
) -> Float[Tensor, "B T H V"]:
    """The definition, query by query."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    s, outputs = torch.arange(q.shape[1]), []
    for t in s:
        seen = index_set.sees(t, s) & ((s <= t) | (not causal))
        weights = (torch.einsum("bhk,bshk->bhs", q[:, t], k[:, seen]) / q.shape[-1] ** 0.5).softmax(-1)
        outputs.append(torch.einsum("bhs,bshv->bhv", weights, v[:, seen]))
    return torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])


def sparse_attention_flops(
    T: int, B: int, H: int, K: int, index_set: IndexSet, mode: Literal["forward", "prefill", "step"]
) -> float:
    """Products q.k and p.v of T tokens, or of one after T; masked pairs count."""
    return 4.0 * B * H * K * (pairs(index_set, 1, T) if mode == "step" else pairs(index_set, T))
