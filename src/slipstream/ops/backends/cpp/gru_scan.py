"""GRU by C++: the products of the tokens are torch's, the loop through time and that of its gradient are C++."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import as_type, call, offer, wants_gradient
from slipstream.ops.backends.cpp.semilinear_scan import SHORT, by_weights
from slipstream.ops.dispatch import torch_forms
from slipstream.ops.nonlinear_scan import gru_scan
from slipstream.ops.valid import zero_padding


def run(x: Tensor, weights: list[Tensor], state: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if x.shape[1] < SHORT:
        with torch_forms():
            return gru_scan(x, weights, state, lengths)
    W, U, b, b2 = (as_type(w, x.dtype) for w in weights)
    h, H = as_type(state, x.dtype), state.shape[1]
    inner = b2[2 * H :]  # of n: the reset gate weighs it too, so it stays with the product of h
    into = F.linear(zero_padding(x, lengths), W, torch.cat([b[: 2 * H] + b2[: 2 * H], b[2 * H :]]))
    if wants_gradient(into, U, inner, h):
        return _GRUScan.apply(into, U, inner, h, lengths)
    return _forward(into, U.contiguous(), inner, h.contiguous(), lengths, None)


def _forward(
    into: Tensor, U: Tensor, inner: Tensor, h: Tensor, lengths: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """kept (B T 4H): what the gradient asks for, or None."""
    y, last = into.new_empty(*into.shape[:2], h.shape[1]), h.clone()
    call("nonlinear_scan", "gru", into.dtype, (into, U, inner, h, lengths, y, last, kept), *y.shape)
    return y, last


class _GRUScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, into: Tensor, U: Tensor, inner: Tensor, h: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        into, U, inner, h = (t.contiguous() for t in (into, U, inner, h))
        kept = into.new_empty(*into.shape[:2], 4 * h.shape[1])
        y, last = _forward(into, U, inner, h, lengths, kept)
        ctx.save_for_backward(U, h, lengths, y, kept)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, g_last: Tensor) -> tuple[Tensor | None, ...]:
        U, h, lengths, y, kept = ctx.saved_tensors
        g, gn, gh = (
            y.new_empty(*y.shape[:2], len(U)),
            torch.empty_like(y),
            g_last.clone(memory_format=torch.contiguous_format),
        )
        tensors = (U, h, y, kept, gy.contiguous(), lengths, g, gn, gh)
        call("nonlinear_scan", "gru_backward", g.dtype, tensors, *y.shape)
        H = h.shape[1]
        return torch.cat([g[..., : 2 * H], gn], -1), by_weights(g, h, y), g[..., 2 * H :].sum((0, 1)), gh, None


offer("gru_scan", run, kernel="nonlinear_scan")
