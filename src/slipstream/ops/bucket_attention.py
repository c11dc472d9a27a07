r"""Softmax attention inside buckets: a token meets the earlier tokens that carry its bucket id, in any of several rounds.

    G_r(t) = the last W of {s <= t : b_r(s) = b_r(t)}        o_t = sum_{s in union of G_r(t)} softmax_s(scale * q_t . k_s) v_s

With own=False a token meets itself only where it meets nobody else (Reformer: Kitaev et al. 2020, arXiv:2001.04451). A pair
that several rounds bring together counts once: the paper's division by how often it is met, without the division.

A token's code in a round, bucket * 2^32 + how many tokens the bucket had before, says it all: s is in G_r(t) where the code of
t less that of s is in 0 ... W-1. Tokens sorted by code meet along a band, which is read in tiles; rounds are merged by the
logarithms of their denominators. What can still be read is the state, of fixed size: for each round and bucket a ring of its
last W tokens. Work and memory are linear in T; G(t) depends on no later token, and on no chunking, so that any cut is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mode
from slipstream.ops.recompute import recomputed
from slipstream.ops.softmax import Softmax, merge, read_with_lse
from slipstream.ops.valid import valid_mask, zero_padding

STRIDE = 2**32  # codes of one bucket: more than any bucket has tokens
EMPTY = -float(STRIDE)  # the code of a place that holds no token: met by none
TILE = 1024  # sorted tokens read at once
Keys = tuple[Tensor, Tensor, Tensor]  # k (B H S K), v (B H S V), codes (B H S R)


class Rings(NamedTuple):
    """The last W tokens of each of C buckets in each round r; code: of the token in every round (whole numbers).

    A token stands at place bucket * W + (its number in the bucket) % W.
    """

    k: Float[Tensor, "B H R CW K"]
    v: Float[Tensor, "B H R CW V"]
    code: Float[Tensor, "B H R CW R"]


def bucket_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    bucket: Int[Tensor, "B T H R"],
    window: int,
    lengths: Int[Tensor, "B"] | None = None,
    scale: float | None = None,
    own: bool = True,
) -> Float[Tensor, "B T H V"]:
    """Whole sequences: nothing came before, and nothing is kept."""
    q, k, v = (zero_padding(t, lengths).transpose(1, 2) for t in (q, k, v))
    code, _ = _codes(bucket.permute(0, 2, 3, 1), window, None, lengths)
    keys = [(k, v, code.mT)] * code.shape[2]
    return _all_rounds(q, v, keys, window, Softmax(scale), own)


def bucket_prefill(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    bucket: Int[Tensor, "B T H R"],
    window: int,
    rings: Rings,
    lengths: Int[Tensor, "B"] | None = None,
    scale: float | None = None,
    own: bool = True,
) -> tuple[Float[Tensor, "B T H V"], Rings]:
    """Going on from rings; also the rings after each row's last token."""
    q, k, v = (zero_padding(t, lengths).transpose(1, 2) for t in (q, k, v))
    bucket = bucket.permute(0, 2, 3, 1)
    code, stays = _codes(bucket, window, rings, lengths)
    new = k, v, code.mT
    keys = [_beside(_past(rings, r, window), new) for r in range(bucket.shape[2])]
    o = _all_rounds(q, v, keys, window, Softmax(scale), own)
    return o, _kept(rings, k, v, code, bucket, stays, window)


def _all_rounds(
    q: Tensor, values: Tensor, keys: Sequence[Keys], window: int, softmax: Softmax, own: bool
) -> Float[Tensor, "B T H V"]:
    """keys: what each round may see, past ones first. values: of the queries' own tokens."""
    o, lse = merge([_round(q, k, v, code, r, window, softmax, own) for r, (k, v, code) in enumerate(keys)])
    return o if own else torch.where((lse == -torch.inf)[..., None], values.transpose(1, 2), o)


def _codes(
    bucket: Int[Tensor, "B H R T"], window: int, rings: Rings | None, lengths: Int[Tensor, "B"] | None
) -> tuple[Int[Tensor, "B H R T"], Tensor]:
    """New tokens' codes (EMPTY for padding), and which of them are among the last of their buckets."""
    if lengths is not None:
        bucket = bucket.masked_fill(~valid_mask(lengths, bucket.shape[3])[:, None, None], -1)
    ids, order = bucket.sort(dim=-1, stable=True)
    ids = ids.contiguous()
    at = torch.arange(ids.shape[3], device=ids.device)
    number = at - torch.searchsorted(ids, ids)
    later = torch.searchsorted(ids, ids, right=True) - 1 - at
    first = ids * STRIDE
    if rings is not None:
        first = torch.maximum(first, _newest(rings, window).gather(3, ids.clamp(min=0)) + 1)
    code = (first + number).masked_fill(ids < 0, int(EMPTY))
    stays = (later < window) & (ids >= 0)
    return tuple(torch.empty_like(t).scatter(3, order, t) for t in (code, stays))  # type: ignore[return-value]


def _own_codes(rings: Rings) -> Float[Tensor, "B H R CW"]:
    """What each ring holds, by its own round's codes."""
    return rings.code.diagonal(dim1=2, dim2=4).mT


def _newest(rings: Rings, window: int) -> Int[Tensor, "B H R C"]:
    return _own_codes(rings).unflatten(3, (-1, window)).amax(-1).long()


def _beside(old: Keys, new: Keys) -> Keys:
    k, v, code = (torch.cat(pair, 2) for pair in zip(old, new))
    return k, v, code


def _past(rings: Rings, r: int, window: int) -> Keys:
    """Keys, values and codes in one round's rings; as many places as the fullest ring has filled."""
    held = (_own_codes(rings)[:, :, r] != EMPTY).unflatten(2, (-1, window)).sum(-1)
    filled = int(held.max()) if held.numel() else 0
    k, v, code = (t[:, :, r].unflatten(2, (-1, window))[:, :, :, :filled].flatten(2, 3) for t in rings)
    return k, v, code.long()


def _round(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H S K"],
    v: Float[Tensor, "B H S V"],
    code: Int[Tensor, "B H S R"],
    r: int,
    window: int,
    softmax: Softmax,
    own: bool,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T H"]]:
    """What queries read of one round that no round before has read. The last T of the keys are the queries' own tokens."""
    past, (T, S) = k.shape[2] - q.shape[2], (q.shape[2], k.shape[2])
    order = code[..., r].argsort(-1)
    block, reach = tile_shape(S, window)
    end = max(1, -(-S // block)) * block - S
    line = [_by(order, t) for t in (F.pad(q, (0, 0, past, 0)), k, v, code)]
    qs, own_codes = F.pad(line[0], (0, 0, 0, end)), F.pad(line[3], (0, 0, 0, end), value=int(EMPTY))
    seen = [F.pad(t, (0, 0, reach, end)) for t in line[1:3]]
    seen.append(F.pad(line[3], (0, 0, reach, end), value=int(EMPTY)))
    bands = [t.unflatten(2, (-1, block)) for t in (qs, own_codes)] + [t.unfold(2, reach + block, block) for t in seen]
    tiles = zip(*(t.split(max(1, TILE // block), 2) for t in bands))
    outs = [recomputed(_tile, *tile, r, window, softmax, own) for tile in tiles]
    o, lse = (torch.cat(parts, 2) for parts in zip(*outs))
    back = torch.empty_like(order).scatter(2, order, torch.arange(S, device=order.device).expand_as(order))
    back = back[:, :, S - T :]
    return _by(back, o).transpose(1, 2), lse.gather(2, back).transpose(1, 2)


def tile_shape(tokens: int, window: int) -> tuple[int, int]:
    """Queries of a tile, and how many sorted tokens before its first it must see."""
    return max(8, min(64, window)), min(window, max(tokens, 1)) - 1


def _by(order: Int[Tensor, "B H N"], t: Tensor) -> Tensor:
    return t.gather(2, order[..., None].expand(-1, -1, -1, t.shape[3]))


def _tile(
    q: Float[Tensor, "B H n C K"],
    q_code: Int[Tensor, "B H n C R"],
    k: Float[Tensor, "B H n K S"],
    v: Float[Tensor, "B H n V S"],
    k_code: Int[Tensor, "B H n R S"],
    r: int,
    window: int,
    softmax: Softmax,
    own: bool,
) -> tuple[Float[Tensor, "B H N V"], Float[Tensor, "B H N"]]:
    """Some blocks of queries, each with the keys of its band."""
    mask = _met(q_code[..., None, :] - k_code.mT[..., None, :, :], r, window, own)
    keys, values = (t.mT.flatten(0, 2)[:, :, None] for t in (k, v))
    o, lse = read_with_lse(q.flatten(0, 2)[:, :, None], keys, values, mask.flatten(0, 2)[:, None], softmax)
    o, lse = o[:, :, 0].unflatten(0, q.shape[:3]), lse[:, :, 0].unflatten(0, q.shape[:3])
    return o.flatten(2, 3), lse.flatten(2, 3)


def _met(later: Tensor, r: int, window: int, own: bool) -> Tensor:
    """Which pairs meet in round r for the first time. later (... R): a query's code less a key's, in every round."""
    met = (later >= (0 if own else 1)) & (later < window)
    return met[..., r] & ~met[..., :r].any(-1)


def _kept(rings: Rings, k: Tensor, v: Tensor, code: Tensor, bucket: Tensor, stays: Tensor, window: int) -> Rings:
    """The rings with the last of the new tokens in their places; tokens that do not stay go to a place behind, cut off."""
    places = rings.k.shape[3]
    at = torch.where(stays, bucket * window + code % STRIDE % window, places)[..., None]
    news = (k[:, :, None], v[:, :, None], code.mT[:, :, None])
    return Rings(*(_written(F.pad(old, (0, 0, 0, 1)), at, new)[:, :, :, :places] for old, new in zip(rings, news)))


def _written(ring: Float[Tensor, "B H R N K"], at: Int[Tensor, "B H R T 1"], new: Tensor) -> Tensor:
    """The ring with new tokens in their places: the ring itself, where no gradient needs it as it was."""
    width = (*at.shape[:4], ring.shape[4])
    at, new = at.expand(width), new.expand(width).to(ring.dtype)
    if torch.is_grad_enabled() and (ring.requires_grad or new.requires_grad):
        return ring.scatter(3, at, new)
    return ring.scatter_(3, at, new)


def bucket_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H V"],
    bucket: Int[Tensor, "B 1 H R"],
    window: int,
    rings: Rings,
    scale: float | None = None,
    own: bool = True,
) -> tuple[Float[Tensor, "B 1 H V"], Rings]:
    """One token: it takes the place of the oldest in the rings of its buckets, and reads them."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    ids = bucket[:, 0]
    mine = (ids * window)[..., None] + torch.arange(window, device=ids.device)  # B H R W
    newest = _own_codes(rings).gather(3, mine).amax(-1)
    code = torch.maximum(newest + 1, (ids * STRIDE).to(newest.dtype))
    at = (ids * window)[..., None, None] + (code % STRIDE % window).long()[..., None, None]
    news = (k[:, :, None], v[:, :, None], code[:, :, None, None])
    rings = Rings(*(_written(old, at, new) for old, new in zip(rings, news)))
    keys, values, codes = (t.gather(3, mine[..., None].expand(*mine.shape, t.shape[4])) for t in rings)
    later = code[:, :, None, None] - codes
    mask = torch.cat([_met(later[:, :, r], r, window, own) for r in range(ids.shape[2])], -1)
    keys, values = (t.flatten(2, 3).flatten(0, 1)[:, :, None].to(q.dtype) for t in (keys, values))
    o, lse = read_with_lse(q.flatten(0, 1)[:, :, None], keys, values, mask.flatten(0, 1)[:, None, None], Softmax(scale))
    o, lse = o[:, 0, 0].unflatten(0, q.shape[:2]), lse[:, 0, 0].unflatten(0, q.shape[:2])
    if not own:
        o = torch.where((lse == -torch.inf)[..., None], v[:, :, 0], o)
    return o[:, None], rings


def bucket_flops(T: int, B: int, H: int, K: int, V: int, rounds: int, window: int, mode: Mode) -> float:
    """Products with keys and values, of T first tokens or of one after T; masked pairs count."""
    if mode == "step":
        return 2.0 * B * H * rounds * window * (K + V)
    block, reach = tile_shape(T, window)
    return 2.0 * B * H * rounds * -(-T // block) * block * (reach + block) * (K + V)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    bucket: Int[Tensor, "B T H R"],
    window: int,
    scale: float | None = None,
    own: bool = True,
) -> Float[Tensor, "B T H V"]:
    """The definition, set by set."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o = v.clone()
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        met: set[int] = set()
        for r in range(bucket.shape[3]):
            same = [s for s in range(t + 1) if bucket[b, s, h, r] == bucket[b, t, h, r]]
            met |= set(same[-window:])
        keys = sorted(met if own else met - {t}) or [t]
        weights = (scale * k[b, keys, h] @ q[b, t, h]).softmax(-1)
        o[b, t, h] = weights @ v[b, keys, h]
    return o
