"""The recurrence of tanh networks by C++: the loop through time, and that of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import as_type, blank, call, offer, wants_gradient
from slipstream.ops.dispatch import torch_forms
from slipstream.ops.semilinear_scan import semilinear_scan
from slipstream.ops.valid import zero_padding

SHORT = 4  # tokens below which laying out the weights for the kernel costs more than it gains


def run(x: Tensor, U: Tensor, n_tanh: int, state: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if x.shape[1] < SHORT:
        with torch_forms():
            return semilinear_scan(x, U, n_tanh, state, lengths)
    U, state = as_type(U, x.dtype), as_type(state, x.dtype)
    if wants_gradient(x, U, state):
        return _SemilinearScan.apply(zero_padding(x, lengths), U, state, lengths, n_tanh)
    return _forward(x, U, state, lengths, n_tanh)


def _forward(x: Tensor, U: Tensor, start: Tensor, lengths: Tensor | None, n_tanh: int) -> tuple[Tensor, Tensor]:
    x, U, start = x.contiguous(), U.contiguous(), start.contiguous()
    out, last = blank(x), start.clone()
    call("semilinear_scan", "forward", x.dtype, (x, U, start, lengths, out, last), *x.shape, n_tanh)
    return out, last


class _SemilinearScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, start: Tensor, lengths: Tensor | None, n_tanh: int
    ) -> tuple[Tensor, Tensor]:
        out, last = _forward(x, U, start, lengths, n_tanh)
        ctx.save_for_backward(U, start, lengths, out)
        ctx.n_tanh = n_tanh
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor, g_last: Tensor) -> tuple[Tensor | None, ...]:
        U, start, lengths, out = ctx.saved_tensors
        g, g_start = blank(out), g_last.clone(memory_format=torch.contiguous_format)
        tensors = (U.contiguous(), out, g_out.contiguous(), lengths, g, g_start)
        call("semilinear_scan", "backward", out.dtype, tensors, *out.shape, ctx.n_tanh)
        return g, by_weights(g, start, out), g_start, None, None


def by_weights(g: Tensor, start: Tensor, out: Tensor) -> Tensor:
    """Gradient (G H) of weights, from those of what they made (B T G) and from the states (B T H) they were multiplied with."""
    before = torch.cat([start[:, None], out[:, :-1]], 1)
    return g.flatten(0, 1).mT @ before.flatten(0, 1)


offer("semilinear_scan", run)
