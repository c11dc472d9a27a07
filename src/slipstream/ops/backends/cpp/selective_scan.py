"""The selective recurrence by C++: one pass through time for each strip of channels, no tensor of states but chunk borders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import call, offer

CHUNK = 16  # as in selective_scan.cpp


def run(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk_size: int = CHUNK,
    signed: bool = False,
) -> tuple[Tensor, Tensor]:
    start = x.new_zeros(x.shape[0], x.shape[2], B.shape[2]) if state is None else state
    wide = torch.promote_types(x.dtype, start.dtype)
    if x.shape[1] == 0:
        return x, start.to(wide)
    rate = None if A is None else A.mT.to(wide).contiguous()
    lines = (v.to(wide).contiguous() for v in (x, dt, B, C))
    kind = 2 if A is None else int(signed)
    y, final = _SelectiveScan.apply(*lines, rate, start.mT.to(wide).contiguous(), lengths, kind)
    return y.to(x.dtype), final.mT.contiguous()


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor | None,
        start: Tensor,
        lengths: Tensor | None,
        kind: int,
    ) -> tuple[Tensor, Tensor]:
        (batch, T, D), N = x.shape, B.shape[2]
        y, final = torch.empty_like(x), torch.empty_like(start)
        keep = any(ctx.needs_input_grad)
        bounds = x.new_empty(batch, -(-T // CHUNK), N, D) if keep else None
        tensors = (x, dt, A, B, C, start, lengths, y, final, bounds)
        call("selective_scan", "forward", x.dtype, tensors, batch, T, D, N, kind)
        if keep:
            ctx.save_for_backward(x, dt, B, C, A, lengths, bounds)
            ctx.kind = kind
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, g_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, B, C, A, lengths, bounds = ctx.saved_tensors
        (batch, T, D), N, parts = x.shape, B.shape[2], torch.get_num_threads()
        gx, gdt, g_start = torch.empty_like(x), torch.empty_like(x), x.new_empty(batch, N, D)
        gA = None if A is None else x.new_empty(batch, N, D)
        gB, gC = x.new_zeros(parts, batch, T, N), x.new_zeros(parts, batch, T, N)
        gy, g_final = gy.contiguous(), g_final.contiguous()
        tensors = (x, dt, A, B, C, lengths, bounds, gy, g_final, gx, gdt, gA, gB, gC, g_start)
        call("selective_scan", "backward", x.dtype, tensors, batch, T, D, N, ctx.kind, parts)
        return gx, gdt, gB.sum(0), gC.sum(0), None if gA is None else gA.sum(0), g_start, None, None


offer("selective_scan", run)
