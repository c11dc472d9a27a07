"""The gate by C++: one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import as_type, blank, call, offer, rows, wants_gradient


def run(x: Tensor, gate: Tensor) -> Tensor:
    gate = as_type(gate, x.dtype)
    return _SiluGate.apply(x, gate) if wants_gradient(x, gate) else _forward(x, gate)


def _forward(x: Tensor, gate: Tensor) -> Tensor:
    (x, apart), (gate, gate_apart) = rows(x), rows(gate)
    y, width = blank(x), x.shape[-1]
    call("silu_gate", "forward", x.dtype, (x, gate, y), y.numel() // max(width, 1), width, apart, gate_apart)
    return y


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return _forward(x, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, Tensor]:
        (x, apart), (gate, gate_apart) = map(rows, ctx.saved_tensors)
        gx, g_gate = (blank(x) for _ in range(2))
        width = x.shape[-1]
        tensors = (x, gate, gy.contiguous(), gx, g_gate)
        call("silu_gate", "backward", x.dtype, tensors, gx.numel() // max(width, 1), width, apart, gate_apart)
        return gx, g_gate


offer("silu_gate", run)
