"""Attention of many queries by C++: each reads a range of keys, in blocks that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.backends.cpp.calls import as_type, call
from slipstream.ops.softmax import Softmax


def range_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor | None,
    softmax: Softmax,
    window: int = 0,
    causal: bool = True,
    lengths: Tensor | None = None,
) -> Tensor:
    """window 0: all keys. Whatever the keys beyond lengths hold, the tokens within them do not see."""
    (B, T, H, K), (S, G, V) = q.shape, v.shape[1:]
    q, k, v = (as_type(x if x.stride(3) == 1 else x.contiguous(), q.dtype) for x in (q, k, v))
    sinks = None if softmax.sinks is None else as_type(softmax.sinks, q.dtype).contiguous()
    past, lengths = (None if x is None else as_type(x, torch.long).contiguous() for x in (past, lengths))
    o = q.new_empty(B, T, H, V)
    sizes = (B, T, S, H, G, K, V, window, causal, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    how = float(softmax.scale_of(K)), float(softmax.cap or 0)
    call("attention", "forward", q.dtype, (q, k, v, sinks, past, lengths, o), *map(int, sizes), *how)
    return o
