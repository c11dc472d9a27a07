"""The recurrence of sLSTM by C++: the two loops through time; what can be done for all tokens at once stays torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops import slstm_scan as op
from slipstream.ops.backends.cpp.calls import call, offer


def run(gates: Tensor, U: Tensor, state: op.SLSTMState, lengths: Tensor | None = None) -> tuple[Tensor, op.SLSTMState]:
    return op.over_lines(_SLSTMScan.apply, gates, U, state, lengths)


class _SLSTMScan(torch.autograd.Function):
    """gates (T H B 4K), R (H K 4K), states (H B K) -> all h, c, n, m (T H B K)."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, R: Tensor, *start: Tensor) -> tuple[Tensor, ...]:
        raw, R = gates.clone(memory_format=torch.contiguous_format), R.contiguous()
        start = tuple(s.contiguous() for s in start)
        lines = [raw.new_empty(*raw.shape[:3], raw.shape[3] // 4) for _ in start]
        call("slstm_scan", "forward", raw.dtype, (raw, R, *start, *lines), *lines[0].shape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(raw, R, *start, *lines)
        return tuple(lines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, ...]:
        raw, R, *states = ctx.saved_tensors
        before, local = op.local(raw, states[:4], states[4:])
        g_raw, g_start = torch.empty_like(raw), raw.new_empty(4, *states[0].shape)
        given = [None if g is None else g.contiguous() for g in grads]
        tensors = (g_raw, R, *given, *(v.contiguous() for v in local), g_start)
        call("slstm_scan", "backward", raw.dtype, tensors, *states[4].shape)
        return g_raw, torch.einsum("thbk,thbg->hkg", before, g_raw), *g_start


offer("slstm_scan", run)
