"""How the scans with a matrix state call their kernels: lines (B T H .) go as they lie, wherever the last axis is contiguous."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.ops.backends.cpp.calls import call
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
    """rule: q, k, v. Outputs in v's dtype, and the state after each row's last token."""
    q, k, v = rule
    dtype = accumulation_dtype(v) if state is None else accumulation_dtype(v, state)
    (B, T, H, K), V = k.shape, v.shape[3]
    decay, kind = _decay(log_decay, k)
    given = [None if t is None else _line(t, dtype) for t in (q, k, v, decay, *lines)]
    fixed = [None if t is None else t.to(dtype).contiguous() for t in (*constants, state)]
    ends = None if lengths is None else lengths.long().contiguous()
    o, final = v.new_empty(B, T, H, V, dtype=dtype), v.new_empty(B, H, K, V, dtype=dtype)
    apart = [n for t in given for n in ((0, 0, 0) if t is None else t.stride()[:3])]
    call(kernel, "forward", dtype, (*given, *fixed, ends, o, final), B, T, H, K, V, kind, *flags, float(scale), *apart)
    return o.to(v.dtype), final


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
