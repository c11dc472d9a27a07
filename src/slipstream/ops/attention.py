r"""Softmax attention over the past: all of it, or a window; grouped heads; any entering cache.

    o_t = sum_{s in G(t)} softmax_s(scale * q_t . k_s + key_bias_s) v_s        G(t) = {s <= t}   or   {t - W < s <= t}

No T x T matrix is ever held: torch's scaled_dot_product_attention tiles it where the whole sequence is at hand, and where
rows continue caches of their own lengths, keys have a bias, or logits are capped or have sinks, the queries go block by
block, each against the keys it can see, and are read again for the gradient. The rule of torch's tiles is written out in
ops/tiled_attention.py, which is also that of the C++ kernel where no gradients are wanted. A bias of queries would change
nothing: a softmax sees only differences along its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.ops.cached_attention import cached_attention
from slipstream.ops.dispatch import operator
from slipstream.ops.recompute import recomputed
from slipstream.ops.softmax import PLAIN, Softmax, read, read_by_torch, read_with_lse, with_sinks
from slipstream.ops.tile_reads import TilePlaces, read_tiles
from slipstream.ops.valid import zero_padding

BLOCK = 512  # queries that share one mask; bounds memory at BLOCK x keys
NEAR = 64  # the same within a window: enough to fill a matrix product, few enough not to multiply what is masked


def attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    past: Int[Tensor, "B"] | None = None,
    causal: bool = True,
    lengths: Int[Tensor, "B"] | None = None,
    softmax: Softmax = PLAIN,
    key_bias: Float[Tensor, "B S H"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """Full attention; G key heads serve H query heads (G divides H).

    past None: k and v are those of q's own tokens. Otherwise k and v are caches laid out by position, and q_t of row b stands
    at position past_b + t; what the cache holds beyond is not seen. lengths matter only to causal=False, which sees all.
    key_bias is added to a key's logits, by query head. It may be a long running sum in float64: only its differences
    count, and they are taken before it is narrowed.
    """
    if key_bias is not None:
        return _from_caches(q, k, v, past, causal, lengths, softmax, key_bias)
    if q.shape[1] == 1 and causal and past is not None:
        return cached_attention(q, k, v, past + 1, softmax)
    return full_attention(q, k, v, past, causal, lengths, softmax)


@operator()
def full_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    past: Int[Tensor, "B"] | None,
    causal: bool,
    lengths: Int[Tensor, "B"] | None,
    softmax: Softmax,
) -> Float[Tensor, "B T H V"]:
    """The same of many queries, without biases."""
    if past is None and softmax.by_scale_alone and (causal or lengths is None):
        return read_by_torch(q, k, v, scale=softmax.scale, causal=causal)
    return _from_caches(q, k, v, past, causal, lengths, softmax, None)


def _from_caches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor | None,
    causal: bool,
    lengths: Tensor | None,
    softmax: Softmax,
    key_bias: Tensor | None,
) -> Tensor:
    past = torch.zeros(len(q), dtype=torch.long, device=q.device) if past is None else past
    if (
        not torch.compiler.is_compiling()
    ):  # reading only what is filled costs a synchronisation, which a captured graph must not have
        filled = int(past.max()) + q.shape[1] if len(past) else 0
        k, v = k[:, :filled], v[:, :filled]
    ends = past[:, None] + (_until(q, causal, lengths) + 1)
    return _by_blocks(q, k, v, ends, softmax, key_bias)


def _until(q: Tensor, causal: bool, lengths: Tensor | None) -> Int[Tensor, "B T"]:
    """For each query, the last of this call's tokens that it sees."""
    own = torch.arange(q.shape[1], device=q.device).expand(q.shape[0], -1)
    if causal:
        return own
    last = q.shape[1] - 1 if lengths is None else lengths[:, None] - 1
    return torch.zeros_like(own) + last


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, ends: Int[Tensor, "B T"], softmax: Softmax, key_bias: Tensor | None
) -> Tensor:
    """Each block of queries against the keys before the furthest end in it."""
    if q.shape[1] == 1:
        return _block(q, k, v, ends, softmax, key_bias)
    outputs = []
    for i in range(0, q.shape[1], BLOCK):
        end = ends[:, i : i + BLOCK]
        seen = int(end.max()) if len(end) else 0
        outputs.append(recomputed(_block, q[:, i : i + BLOCK], k[:, :seen], v[:, :seen], end, softmax, key_bias))
    return torch.cat(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])


def _block(
    q: Tensor, k: Tensor, v: Tensor, ends: Int[Tensor, "B T"], softmax: Softmax, key_bias: Tensor | None
) -> Tensor:
    """Queries that see the keys before their ends. Biases are taken from that of the first query's own key."""
    mask = _before(ends, k.shape[1])
    if key_bias is not None and 0 not in q.shape[:2]:
        own = (ends[:, :1, None] - 1).expand(-1, -1, key_bias.shape[2])
        bias = (key_bias[:, : k.shape[1]] - key_bias.gather(1, own)).transpose(1, 2)[:, :, None]
        mask = torch.where(mask, bias.to(torch.promote_types(q.dtype, torch.float32)), -torch.inf)
    return read(q, k, v, mask, softmax)


def _before(ends: Int[Tensor, "B T"], keys: int) -> Bool[Tensor, "B 1 T S"]:
    return (torch.arange(keys, device=ends.device) < ends[..., None])[:, None]


@operator()
def window_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    past: Int[Tensor, "B"],
    window: int,
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "B T H V"]:
    """Attention to the last `window` tokens, oneself included. k and v begin with the P = window - 1 tokens before q's first.

    past: how many tokens each row has really seen; what stands before is not attended to. Work is T x (window + NEAR).
    """
    if 0 in q.shape[:2]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    (T, reach), key = (q.shape[1], window - 1), torch.arange(1 - window, NEAR, device=q.device)
    query = torch.arange(min(NEAR, T), device=q.device)[:, None]
    near = q.new_zeros(1, 1, len(query), len(key)).masked_fill((key > query) | (key <= query - window), -torch.inf)

    def tiles() -> Iterator[TilePlaces]:
        for i in range(0, T, NEAR):
            n = min(NEAR, T - i)
            seen = near[:, :, :n, : n + reach]
            if i < reach:  # some of these keys may stand before the row
                seen = seen.masked_fill(key[: n + reach] + i < -past[:, None, None, None], -torch.inf)
            yield slice(i, i + n), slice(i, i + n + reach), seen

    def read_tile(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        return (read(q, k, v, seen, softmax),) if softmax.sinks is None else read_with_lse(q, k, v, seen, softmax)

    outputs = read_tiles(tiles, read_tile, q, k, v)
    return outputs[0] if softmax.sinks is None else with_sinks(outputs[0], outputs[1], softmax)


def write_cache(
    cache: Float[Tensor, "B S *G"],
    new: Float[Tensor, "B T *G"],
    past: Int[Tensor, "B"],
    lengths: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B S *G"]:
    """Put new tokens at positions past_b, past_b + 1, ... The cache is consumed: written in place where no gradient needs it."""
    new = zero_padding(new, lengths).to(cache.dtype)
    rows = torch.arange(len(past), device=past.device)[:, None]
    positions = past[:, None] + torch.arange(new.shape[1], device=past.device)
    if torch.is_grad_enabled() and (cache.requires_grad or new.requires_grad):
        return cache.index_put((rows, positions), new)
    return cache.index_put_((rows, positions), new)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    window: int | None = None,
    causal: bool = True,
    key_bias: Float[Tensor, "B T H"] | None = None,
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "B T H V"]:
    """The definition, query by query."""
    scale = q.shape[-1] ** -0.5 if softmax.scale is None else softmax.scale
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    outputs = []
    for t in range(q.shape[1]):
        first = max(0, t - window + 1) if window else 0
        last = t + 1 if causal else q.shape[1]
        logits = softmax.capped(scale * torch.einsum("bhk,bshk->bhs", q[:, t], k[:, first:last]))
        if key_bias is not None:
            logits = logits + key_bias[:, first:last].mT
        if softmax.sinks is not None:
            logits = torch.cat([logits, softmax.sinks.expand(len(q), -1)[..., None]], -1)
        weights = logits.softmax(-1)[..., : last - first]
        outputs.append(torch.einsum("bhs,bshv->bhv", weights, v[:, first:last]))
    return torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])


def attention_flops(
    T: int, B: int, H: int, K: int, mode: Literal["forward", "prefill", "step"], window: int | None = None
) -> float:
    """Products q.k and p.v of T tokens, or of one after T; masked pairs count. K: the greater of keys' and values' widths."""
    if window is None:
        pairs = T + 1 if mode == "step" else T * T
    else:
        full, rest = divmod(1 if mode == "step" else T, NEAR)
        pairs = full * NEAR * (NEAR + window - 1) + rest * (rest + window - 1)
    return 4.0 * B * H * K * pairs
