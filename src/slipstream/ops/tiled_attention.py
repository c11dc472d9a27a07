r"""FlashAttention's rule, written out: softmax attention and its gradient by tiles, the T x T matrix never made.

Forward, for a tile of queries, over tiles of keys j = 1, 2, ...; m is the largest logit so far, d the denominator over e^m:

    S = scale Q K_j^T      m' = max(m, rowmax S)      P = e^{S - m'}
    d <- e^{m - m'} d + rowsum P      O <- e^{m - m'} O + P V_j      m <- m'         at the end  O <- O / d,  L = m + log d

Backward, from Q, K, V, O and the one number L a row, each tile of weights made again:

    P = e^{scale Q K_j^T - L}      dV_j += P^T dO      dS = P * (dO V_j^T - rowsum(dO * O))
    dQ += scale dS K_j      dK_j += scale dS^T Q

Dao et al. 2022, arXiv:2205.14135; queries outermost and one division at the end as in FlashAttention-2 (Dao 2023,
arXiv:2307.08691). This is the rule that torch's kernels behind `attention` follow, for reading and for checking them: it is
exact, holds one tile, and is not fast. Keys after a query are skipped by whole tiles; grouped heads it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

TILE = 128  # queries, and keys, of a tile


def reference_tiled(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S H K"],
    v: Float[Tensor, "B S H V"],
    causal: bool = True,
    scale: float | None = None,
    tile: int = TILE,
) -> Float[Tensor, "B T H V"]:
    """Attention of all queries to all keys; causal: to those that do not stand after, the last query standing at the last key."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return _Tiled.apply(*heads, causal, scale, tile).transpose(1, 2)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, tile: int) -> Tensor:
        ctx.settings = causal, scale, tile
        o, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -torch.inf)
        for rows in _tiles(q.shape[2], tile):
            o[:, :, rows], lse[:, :, rows] = _read_rows(q, k, v, rows, causal, scale, tile)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (q, k, v, o, lse), (causal, scale, tile), do = ctx.saved_tensors, ctx.settings, gradients[0]
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        through_denominator = (do * o).sum(-1, keepdim=True)
        for rows in _tiles(q.shape[2], tile):
            for keys in _tiles_seen(q, k, rows, causal, tile):
                p = (_logits(q, k, rows, keys, causal, scale) - lse[:, :, rows, None]).exp()
                dv[:, :, keys] += p.mT @ do[:, :, rows]
                ds = p * (do[:, :, rows] @ v[:, :, keys].mT - through_denominator[:, :, rows])
                dq[:, :, rows] += scale * ds @ k[:, :, keys]
                dk[:, :, keys] += scale * ds.mT @ q[:, :, rows]
        return dq, dk, dv, None, None, None


def _read_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, causal: bool, scale: float, tile: int
) -> tuple[Float[Tensor, "B H t V"], Float[Tensor, "B H t"]]:
    """One tile of queries over all its tiles of keys."""
    largest = q.new_full(q[:, :, rows, :1].shape, torch.finfo(q.dtype).min)
    total, o = torch.zeros_like(largest), q.new_zeros(*largest.shape[:3], v.shape[3])
    for keys in _tiles_seen(q, k, rows, causal, tile):
        logits = _logits(q, k, rows, keys, causal, scale)
        before, largest = largest, largest.maximum(logits.amax(-1, keepdim=True))
        shrink, p = (before - largest).exp(), (logits - largest).exp()
        total, o = shrink * total + p.sum(-1, keepdim=True), shrink * o + p @ v[:, :, keys]
    return o / total, (largest + total.log())[..., 0]


def _logits(q: Tensor, k: Tensor, rows: slice, keys: slice, causal: bool, scale: float) -> Float[Tensor, "B H t s"]:
    logits = scale * q[:, :, rows] @ k[:, :, keys].mT
    if not causal:
        return logits
    query = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + k.shape[2] - q.shape[2]
    return logits.masked_fill(torch.arange(keys.start, keys.stop, device=q.device) > query, -torch.inf)


def _tiles(n: int, tile: int) -> Iterator[slice]:
    return (slice(i, min(n, i + tile)) for i in range(0, n, tile))


def _tiles_seen(q: Tensor, k: Tensor, rows: slice, causal: bool, tile: int) -> Iterator[slice]:
    """Tiles of keys of which a query in these rows sees any."""
    return _tiles(rows.stop + k.shape[2] - q.shape[2] if causal else k.shape[2], tile)
