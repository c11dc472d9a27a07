"""Bounds of pages by C++: what is known of each is read once."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import as_type, call, offer


def run(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    batch, P, G, K = low.shape
    bounds = q.new_empty(batch, G, P)
    tensors = (q.contiguous(), *(as_type(side, q.dtype).contiguous() for side in (low, high)), bounds)
    call("page_bounds", "forward", q.dtype, tensors, batch, P, q.shape[2], G, K)
    return bounds


offer("page_bounds", run, gradients=False)
