r"""Softmax attention in segments, whose logits also depend on the distance of query and key.

    o_t = sum_{s in G(t)} softmax_s((q_t . k_s + p_t . r_{t-s}) / sqrt(K)) v_s
    G(t) = {s <= t : s in the segment of t, or in the `back` segments before it}

Products with all distances are made for a tile of queries at a time, and moved to the keys they belong to.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.ops.index_sets import Segments
from slipstream.ops.index_tiles import Tile, groups, pairs
from slipstream.ops.softmax import read_by_logits
from slipstream.ops.sparse_attention import over_tiles


def relative_attention(
    q: Float[Tensor, "B T H K"],
    p: Float[Tensor, "B T H P"],
    k: Float[Tensor, "B S H K"],
    v: Float[Tensor, "B S H V"],
    r: Float[Tensor, "#H P n"],
    segments: Segments,
    past: Int[Tensor, "B"],
    first: Int[Tensor, "B"],
) -> Float[Tensor, "B T H V"]:
    """q_t of row b stands at position past_b + t, k and v begin at first_b. r: of the distances 0, 1, ..., as many as occur."""
    K, heads = q.shape[3], q.shape[2]

    def read_tile(qp: Tensor, k: Tensor, v: Tensor, apart: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        q, p = qp.transpose(1, 2).split([K, qp.shape[3] - K], 3)
        by_distance = p @ r.expand(heads, -1, -1).repeat(q.shape[1] // heads, 1, 1)
        moved = by_distance.gather(3, apart.clamp(min=0).expand(-1, q.shape[1], -1, -1))
        logits = (q @ k.permute(0, 2, 3, 1) + moved) * K**-0.5
        return (read_by_logits(logits.to(torch.promote_types(q.dtype, torch.float32)), v, apart >= 0)[0],)

    (group,) = groups(segments, q.shape[1])
    return over_tiles(read_tile, torch.cat([q, p], 3), k, v, group, past, first, meets=_apart, shared=(r,))[0]


def _apart(tile: Tile) -> Int[Tensor, "R N n m"]:
    """How far apart a query and a key that it sees are; -1 where it does not see it."""
    apart = tile.queries[..., None] - tile.keys[..., None, :]
    return torch.where(tile.meets & (apart >= 0), apart, -1).long()


def reference(
    q: Float[Tensor, "B T H K"],
    p: Float[Tensor, "B T H P"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    r: Float[Tensor, "H P n"],
    segments: Segments,
) -> Float[Tensor, "B T H V"]:
    """The definition, query by query."""
    s, outputs = torch.arange(q.shape[1]), []
    for t in s:
        seen = segments.sees(t, s) & (s <= t)
        by_content = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, seen])
        by_distance = torch.einsum("bhp,hps->bhs", p[:, t], r[:, :, t - s[seen]])
        weights = ((by_content + by_distance) / q.shape[3] ** 0.5).softmax(-1)
        outputs.append(torch.einsum("bhs,bshv->bhv", weights, v[:, seen]))
    return torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])


def relative_attention_flops(T: int, B: int, H: int, K: int, P: int, segments: Segments) -> float:
    """Products of q.k and p.v, and with all distances, of T tokens; masked pairs count."""
    worked = pairs(segments, T)
    return B * H * worked * (4.0 * K + 2.0 * P)
