"""The selective recurrence by C++: one pass through time for each strip of channels, no tensor of states but chunk borders.

Without gradients the softplus of dt, the skip and the gate are in the same pass; with them torch does these around it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import as_type, blank, call, offer, rows, wants_gradient
from slipstream.ops.selective_scan import skipped_and_gated
from slipstream.ops.valid import zero_padding

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
    softplus: bool = False,
    D: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    start = x.new_zeros(x.shape[0], x.shape[2], B.shape[2]) if state is None else state
    wide = torch.promote_types(x.dtype, start.dtype)
    if x.shape[1] == 0:
        return x, start.to(wide)
    kind = 2 if A is None else int(signed)
    lines = tuple(as_type(v, wide) for v in (x, dt, B, C))
    rate, start = None if A is None else as_type(A, wide).mT.contiguous(), as_type(start, wide).mT
    if wants_gradient(x, dt, A, B, C, start, D, gate):
        wx, wdt, wB, wC = lines
        inner = (wx, F.softplus(zero_padding(wdt, lengths)) if softplus else wdt, wB, wC)
        o, final = _SelectiveScan.apply(*(v.contiguous() for v in inner), rate, start.contiguous(), lengths, kind)
        return skipped_and_gated(o.to(x.dtype), x, D, gate, lengths), final.mT.contiguous()
    around = (as_type(D, wide), as_type(gate, wide))
    y, final = _forward(lines, rate, start, lengths, kind, softplus, *around, bounds=None)
    return as_type(y, x.dtype), final.mT.contiguous()


def _forward(
    lines: tuple[Tensor, ...],
    A: Tensor | None,
    start: Tensor,
    lengths: Tensor | None,
    kind: int,
    softplus: bool = False,
    D: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """lines: x, dt, B, C. A (N D) and start (B N D) as the kernel has them; start may lie in any way."""
    (x, dt, B, C), apart = zip(*map(rows, lines))
    gate, gate_apart = (None, 0) if gate is None else rows(gate)
    y, states = blank(x), start.clone(memory_format=torch.contiguous_format)
    tensors = (x, dt, A, B, C, None if D is None else D.contiguous(), gate, lengths, states, y, bounds)
    call("selective_scan", "forward", x.dtype, tensors, *x.shape, B.shape[2], kind, int(softplus), *apart, gate_apart)
    return y, states


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
        bounds = x.new_empty(batch, -(-T // CHUNK), N, D)
        ctx.save_for_backward(x, dt, B, C, A, lengths, bounds)
        ctx.kind = kind
        return _forward((x, dt, B, C), A, start, lengths, kind, bounds=bounds)

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
