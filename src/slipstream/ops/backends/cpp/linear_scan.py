"""The linear recurrence of a vector state by C++: each number is read once, forwards and backwards."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import SUFFIX, call, offer


def run(decay: Tensor, b: Tensor, state: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(decay.dtype, b.dtype)
    start = b.new_zeros(b.shape[0], *b.shape[2:]) if state is None else state
    wide = torch.promote_types(kind, start.dtype)
    if b.shape[1] == 0:
        return b.to(kind), start.to(wide)
    lines = (v.to(wide).resolve_conj().contiguous() for v in (decay, b, start))
    h = _LinearScan.apply(*lines, lengths)
    return h.to(kind), h[:, -1].clone()  # a copy: a view would keep all of h alive as long as the state


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, b: Tensor, start: Tensor, lengths: Tensor | None) -> Tensor:
        h = torch.empty_like(b)
        call("linear_scan", "forward", b.dtype, (decay, b, start, lengths, h), *_sizes(b))
        ctx.save_for_backward(decay, h, start, lengths)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        decay, h, start, lengths = ctx.saved_tensors
        g_decay, g_b, g_start = torch.empty_like(h), torch.empty_like(h), torch.empty_like(start)
        grad = grad.resolve_conj().contiguous()
        tensors = (decay, h, start, lengths, grad, g_decay, g_b, g_start)
        call("linear_scan", "backward", h.dtype, tensors, *_sizes(h))
        return g_decay, g_b, g_start, None


def _sizes(line: Tensor) -> tuple[int, int, int]:
    """Rows, tokens, channels of (B T *R)."""
    return line.shape[0], line.shape[1], math.prod(line.shape[2:])


offer("linear_scan", run, SUFFIX)
