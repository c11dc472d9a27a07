"""Norms of rows by C++, with weight and gate in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import as_type, blank, call, offer, rows, wants_gradient

BLOCK = 64  # rows whose gradients of the weight one thread sums


def run(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    gate: Tensor | None = None,
    gate_first: bool = False,
) -> Tensor:
    return normed(x, weight, gate, eps, x.shape[-1], gate_first)


def normed(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, per: int, gate_first: bool) -> Tensor:
    """per: what the sum of squares is divided by."""
    gate, weight = as_type(gate, x.dtype), as_type(weight, x.dtype)
    if wants_gradient(x, weight, gate):
        return _Norm.apply(x, weight, gate, float(eps), per, gate_first)
    return _forward(x, weight, gate, float(eps), per, gate_first)


def _forward(x: Tensor, weight: Tensor | None, gate: Tensor | None, *how: float) -> Tensor:
    (x, apart), (gate, gate_apart) = rows(x), (gate, 0) if gate is None else rows(gate)
    y, width = blank(x), x.shape[-1]
    tensors = (x, None if weight is None else weight.contiguous(), gate, y)
    call("rms_norm", "forward", x.dtype, tensors, y.numel() // max(width, 1), width, apart, gate_apart, *how)
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, gate: Tensor | None, *how: float) -> Tensor:
        ctx.save_for_backward(x, weight, gate)
        ctx.how = how
        return _forward(x, weight, gate, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        (x, apart), (gate, gate_apart) = rows(x), (gate, 0) if gate is None else rows(gate)
        width = x.shape[-1]
        n_rows = x.numel() // max(width, 1)
        gx = blank(x)
        gw = None if weight is None else x.new_zeros(-(-n_rows // BLOCK), width)
        g_gate = None if gate is None else blank(x)
        tensors = (x, None if weight is None else weight.contiguous(), gate, gy.contiguous(), gx, gw, g_gate)
        call("rms_norm", "backward", x.dtype, tensors, n_rows, width, apart, gate_apart, *ctx.how, BLOCK)
        return gx, None if gw is None else gw.sum(0), g_gate, None, None, None


offer("rms_norm", run)
