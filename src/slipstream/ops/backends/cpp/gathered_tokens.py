"""Attention over chosen tokens by C++: a step reads them where they lie in the cache."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import as_type, call, offer
from slipstream.ops.softmax import PLAIN, Softmax


def run(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, softmax: Softmax = PLAIN) -> Tensor:
    (batch, T, H, K), V, (C, n) = q.shape, v.shape[3], chosen.shape[2:]
    k, v = (as_type(x if x.stride(3) == 1 else x.contiguous(), q.dtype) for x in (k, v))
    sinks = None if softmax.sinks is None else as_type(softmax.sinks, q.dtype).contiguous()
    o = q.new_empty(batch, T, H, V)
    tensors = (q.contiguous(), k, v, sinks, chosen.long().contiguous(), o)
    sizes = (batch, T, H, K, V, C, n, k.shape[2], *k.stride()[:3], *v.stride()[:3])
    call("gathered_tokens", "forward", q.dtype, tensors, *sizes, float(softmax.scale_of(K)), float(softmax.cap or 0))
    return o


offer("gathered_tokens", run, gradients=False)
