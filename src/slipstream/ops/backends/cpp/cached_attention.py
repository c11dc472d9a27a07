"""Attention of one token over a cache by C++: what is filled is read once, where it lies."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import as_type, call, offer
from slipstream.ops.softmax import PLAIN, Softmax


def run(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, softmax: Softmax = PLAIN) -> Tensor:
    (batch, _, H, K), V = q.shape, v.shape[3]
    k, v = (as_type(x if x.stride(3) == 1 else x.contiguous(), q.dtype) for x in (k, v))
    sinks = None if softmax.sinks is None else as_type(softmax.sinks, q.dtype).contiguous()
    o = q.new_empty(batch, 1, H, V)
    tensors = (q.contiguous(), k, v, sinks, ends.long().contiguous(), o)
    sizes = (batch, k.shape[1], H, K, V, k.shape[2], *k.stride()[:3], *v.stride()[:3])
    call("cached_attention", "forward", q.dtype, tensors, *sizes, float(softmax.scale_of(K)), float(softmax.cap or 0))
    return o


offer("cached_attention", run, gradients=False)
