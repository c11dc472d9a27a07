"""How the scans with a matrix state call their kernels: lines (B T H .) go as they lie, wherever the last axis is contiguous."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import SUFFIX, call, wants_gradient
from slipstream.ops.backends.cpp.library import library
from slipstream.ops.chunks import LogDecay, accumulation_dtype

NONE, HEAD, CHANNEL = range(3)  # as in matrix_state.h


def scan(
    kernel: str,
    rule: tuple[Tensor, Tensor, Tensor],
    log_decay: LogDecay | None,
    state: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    lines: Sequence[Tensor] = (),
    constants: Sequence[Tensor | None] = (),
    flags: Sequence[bool] = (),
) -> tuple[Tensor, Tensor]:
    """rule: q, k, v. Outputs in v's dtype, and the state after each row's last token.

    Where gradients are wanted there is at most one more line, no flag, and every constant is None.
    """
    q, k, v = rule
    dtype = _dtype(v, state)
    decay, kind = _decay(log_decay, k)
    given = [None if t is None else _line(t, dtype) for t in (q, k, v, decay, *lines)]
    fixed = [None if t is None else t.to(dtype).contiguous() for t in (*constants, state)]
    ends = None if lengths is None else lengths.long().contiguous()
    how = _How(kernel, kind, tuple(flags), float(scale))
    if wants_gradient(*given, *fixed):
        o, final = _Scan.apply(how, ends, len(fixed), *fixed, *given)
    else:
        o, final = _forward(how, ends, fixed, given)
    return o.to(v.dtype), final


def trains(kernel: str, log_decay: LogDecay | None, v: Tensor, state: Tensor | None) -> bool:
    """Whether there are gradients by this kernel. Decays by channel train in the torch form."""
    return (log_decay is None or log_decay.ndim < 4) and library(kernel, SUFFIX[_dtype(v, state)]) is not None


def _dtype(v: Tensor, state: Tensor | None) -> torch.dtype:
    return accumulation_dtype(v) if state is None else accumulation_dtype(v, state)


class _How(NamedTuple):
    kernel: str
    kind: int
    flags: tuple[bool, ...]
    scale: float


def _forward(
    how: _How, ends: Tensor | None, fixed: Sequence[Tensor | None], given: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    k, v = given[1:3]
    assert k is not None and v is not None
    (B, T, H, K), V = k.shape, v.shape[3]
    o, final = v.new_empty(B, T, H, V), v.new_empty(B, H, K, V)
    sizes = (B, T, H, K, V, how.kind, *how.flags, how.scale, *_apart(given))
    call(how.kernel, "forward", v.dtype, (*given, *fixed, ends, o, final), *sizes)
    return o, final


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: _How, ends: Tensor | None, n_fixed: int, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """tensors: what is fixed, the last of which is the state; then the lines."""
        ctx.save_for_backward(ends, *tensors[n_fixed - 1 :])
        ctx.how, ctx.n_fixed = how, n_fixed
        return _forward(how, ends, tensors[:n_fixed], tensors[n_fixed:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_o: Tensor, g_final: Tensor) -> tuple[Tensor | None, ...]:
        ends, state, *given = ctx.saved_tensors
        (B, T, H, K), V, dtype = given[1].shape, given[2].shape[3], given[2].dtype
        slopes = [None if t is None else torch.empty(t.shape, dtype=dtype) for t in (*given, state)]
        beta = [None] if len(given) == 4 else []  # outer_scan has none
        tensors = (*given, *beta, state, ends, g_o.contiguous(), g_final.contiguous(), *slopes[:-1], *beta, slopes[-1])
        sizes = (B, T, H, K, V, ctx.how.kind, ctx.how.scale, *_apart([*given, *beta]))
        call(ctx.how.kernel.replace("_scan", "_gradient"), "backward", dtype, tensors, *sizes)
        return None, None, None, *[None] * (ctx.n_fixed - 1), slopes[-1], *slopes[:-1]


def _apart(lines: Sequence[Tensor | None]) -> list[int]:
    """How far rows, tokens and heads of each line stand apart."""
    return [n for t in lines for n in ((0, 0, 0) if t is None else t.stride()[:3])]


def _line(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An expanded axis, or one in a wider tensor, is not copied."""
    x = x.to(dtype)
    return x.contiguous() if x.ndim == 4 and x.stride(3) != 1 else x


def _decay(log_decay: LogDecay | None, k: Tensor) -> tuple[Tensor | None, int]:
    """With an axis of time, along which a constant a head does not move; and its kind."""
    if log_decay is None:
        return None, NONE
    if log_decay.ndim == 1:
        return log_decay.expand(*k.shape[:2], -1), HEAD
    return log_decay, CHANNEL if log_decay.ndim == 4 else HEAD
