"""RWKV-4's weighted mean by C++: sums and their scale stay in registers through all of time. Only without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.backends.cpp.calls import as_type, blank, call, offer
from slipstream.ops.wkv_scan import Sums


def run(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Sums, lengths: Tensor | None = None) -> tuple[Tensor, Sums]:
    dtype = torch.promote_types(k.dtype, state[0].dtype)
    lines = [as_type(t, dtype).contiguous() for t in (k, v, w, u)]
    sums = tuple(t.to(dtype, copy=True, memory_format=torch.contiguous_format) for t in state)
    y = blank(lines[0])
    call("wkv_scan", "forward", dtype, (*lines, lengths, y, *sums), *k.shape)
    return as_type(y, k.dtype), sums  # type: ignore[return-value]


offer("wkv_scan", run, gradients=False)
