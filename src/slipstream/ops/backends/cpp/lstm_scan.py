"""LSTM by C++: the products of the tokens are torch's, the loop through time and that of its gradient are C++."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import as_type, call, offer, wants_gradient
from slipstream.ops.backends.cpp.semilinear_scan import by_weights
from slipstream.ops.valid import zero_padding

States = tuple[Tensor, Tensor]


def run(x: Tensor, weights: list[Tensor], state: States, lengths: Tensor | None = None) -> tuple[Tensor, States]:
    W, U, b, b2 = (as_type(w, x.dtype) for w in weights)
    h, c = (as_type(s, x.dtype) for s in state)
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], 0, h.shape[1]), (h, c)
    into = F.linear(zero_padding(x, lengths), W, b + b2)
    if wants_gradient(into, U, h, c):
        y, h, c = _LSTMScan.apply(into, U, h, c, lengths)
    else:
        y, h, c = _forward(into, U.contiguous(), h.contiguous(), c, lengths, None, None)
    return y, (h, c)


def _forward(
    into: Tensor, U: Tensor, h: Tensor, c: Tensor, lengths: Tensor | None, cs: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """cs (B T H) and kept (B T 4H): what the gradient asks for, or None."""
    y, last, c = into.new_empty(*into.shape[:2], h.shape[1]), h.clone(), c.clone(memory_format=torch.contiguous_format)
    call("nonlinear_scan", "lstm", into.dtype, (into, U, h, lengths, y, last, c, cs, kept), *y.shape)
    return y, last, c


class _LSTMScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, into: Tensor, U: Tensor, h: Tensor, c: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        into, U, h, c = (t.contiguous() for t in (into, U, h, c))
        cs, kept = into.new_empty(*into.shape[:2], h.shape[1]), torch.empty_like(into)
        y, *last = _forward(into, U, h, c, lengths, cs, kept)
        ctx.save_for_backward(U, h, c, lengths, y, cs, kept)
        return y, last[0], last[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, *g_last: Tensor) -> tuple[Tensor | None, ...]:
        U, h, c, lengths, y, cs, kept = ctx.saved_tensors
        g, (gh, gc) = torch.empty_like(kept), (v.clone(memory_format=torch.contiguous_format) for v in g_last)
        tensors = (U, c, cs, kept, gy.contiguous(), lengths, g, gh, gc)
        call("nonlinear_scan", "lstm_backward", g.dtype, tensors, *y.shape)
        return g, by_weights(g, h, y), gh, gc, None


offer("lstm_scan", run, kernel="nonlinear_scan")
