"""Many tiles of attention as one read, with the memory of one tile, forward and backward.

Lines (q, k, v) are long and tiles overlap. Recomputing tile by tile under autograd would make a gradient as long as a whole
line for every tile; here the gradients of tiles are added up in place, so that time and memory stay linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Where a tile stands: the same tokens of all rows of a line (B L ...), or N tiles of n, in a line of one row.
Place = slice | Int[Tensor, "_ _"]
TilePlaces = tuple[Place, Place, Tensor]  # of queries; of keys and values; and what tells which of them meet
Tiles = Callable[[], Iterator[TilePlaces]]
ReadTile = Callable[..., tuple[Tensor, ...]]


def read_tiles(
    tiles: Tiles,
    read_tile: ReadTile,
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G L"],
    v: Float[Tensor, "B S G V"],
    *shared: Tensor,
) -> tuple[Tensor, ...]:
    """What read_tile(q, k, v, meets, *shared) gives for all tiles, each (B T H ...), put where its queries stand.

    tiles() gives them anew each time. A query of no tile reads zero; the second output, if there is one, is -inf there.
    shared: what every tile needs whole.
    """
    if torch.is_grad_enabled():
        return _ReadTiles.apply(tiles, read_tile, q, k, v, *shared)
    return _read(tiles, read_tile, q, k, v, *shared)


def _read(tiles: Tiles, read_tile: ReadTile, q: Tensor, k: Tensor, v: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
    whole: tuple[Tensor, ...] = ()
    for queries, keys, meets in tiles():
        outputs = read_tile(take(q, queries), take(k, keys), take(v, keys), meets, *shared)
        if not whole:
            whole = tuple(x.new_full((*q.shape[:2], *x.shape[2:]), fill) for x, fill in zip(outputs, (0, -torch.inf)))
        for w, x in zip(whole, outputs):
            _put(w, queries, x)
    return whole


class _ReadTiles(torch.autograd.Function):
    """_read, which keeps nothing but its lines for the gradient."""

    @staticmethod
    def forward(ctx: Any, tiles: Tiles, read_tile: ReadTile, *lines: Tensor) -> tuple[Tensor, ...]:
        ctx.tiles, ctx.read_tile = tiles, read_tile
        ctx.save_for_backward(*lines)
        return _read(tiles, read_tile, *lines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        lines = ctx.saved_tensors
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in lines]
        for queries, keys, meets in ctx.tiles():
            places = (queries, keys, keys, *[slice(None)] * (len(lines) - 3))
            with torch.enable_grad():
                leaves = [take(x, place).detach().requires_grad_() for x, place in zip(lines, places)]
                outputs = ctx.read_tile(*leaves[:3], meets, *leaves[3:])
            grads = torch.autograd.grad(outputs, leaves, [take(d, queries) for d in d_outputs])
            for total, place, grad in zip(sums, places, grads):
                _add(total, place, grad.to(total.dtype))
        return None, None, *(total.to(x.dtype) for total, x in zip(sums, lines))


def take(line: Float[Tensor, "B L *H"], place: Place) -> Float[Tensor, "_ _ *H"]:
    """The tokens of a tile."""
    if isinstance(place, slice):
        return line[:, place]
    return line[0].index_select(0, place.flatten()).unflatten(0, place.shape)


def _put(line: Tensor, place: Place, x: Tensor) -> None:
    if isinstance(place, slice):
        line[:, place] = x
    else:
        line[0].index_copy_(0, place.flatten(), x.flatten(0, 1))


def _add(line: Tensor, place: Place, x: Tensor) -> None:
    if isinstance(place, slice):
        line[:, place] += x
    else:
        line[0].index_add_(0, place.flatten(), x.flatten(0, 1))
