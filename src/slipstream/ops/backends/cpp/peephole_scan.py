"""The cell of SRU by C++: one pass through time for a strip of channels, forwards and backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import as_type, blank, call, offer, wants_gradient


def run(u: Tensor, a: Tensor, v: Tensor, state: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(u.dtype, state.dtype)
    given = tuple(as_type(t, wide) for t in (u, a, v, state))
    if u.shape[1] == 0:
        return given[0], given[3]
    if wants_gradient(*given):
        return _PeepholeScan.apply(*given, lengths)
    u, a, v, state = (t.contiguous() for t in given)
    return _forward(u, a, v, state, lengths)


def _forward(u: Tensor, a: Tensor, v: Tensor, start: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    out, last = blank(u), blank(start)
    call("peephole_scan", "forward", u.dtype, (u, a, v, start, lengths, out, last), *u.shape)
    return out, last


class _PeepholeScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, a: Tensor, v: Tensor, start: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        u, a, v, start = (t.contiguous() for t in (u, a, v, start))
        out, last = _forward(u, a, v, start, lengths)
        ctx.save_for_backward(u, a, v, start, lengths, out)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor, g_last: Tensor) -> tuple[Tensor | None, ...]:
        u, a, v, start, lengths, out = ctx.saved_tensors
        gu, ga, gv, g_start = blank(u), blank(u), blank(start), g_last.clone(memory_format=torch.contiguous_format)
        tensors = (u, a, v, start, lengths, out, g_out.contiguous(), gu, ga, gv, g_start)
        call("peephole_scan", "backward", u.dtype, tensors, *u.shape)
        return gu, ga, gv.sum(0), g_start, None


offer("peephole_scan", run)
