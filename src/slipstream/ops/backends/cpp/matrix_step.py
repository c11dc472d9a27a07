"""One token of the rules with a matrix state by C++. Only without gradients, which decoding needs none of."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.backends.cpp.calls import as_type, call

NONE, ONE, CHANNEL = 0, 1, 2  # as in matrix_step.cpp


def matrix_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    beta: Tensor | None = None,
    erase: Tensor | None = None,
    read: Tensor | None = None,
    bonus: Tensor | None = None,
    undecayed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output (B 1 H V) in v's dtype and the next state, which takes the place of the one that is given (and so consumed)."""
    (batch, heads, K, V), dtype = state.shape, state.dtype
    state = state.contiguous()
    o = torch.empty(batch, 1, heads, V, dtype=dtype)
    lines = [_in_order(as_type(t, dtype)) for t in (q, k, v)]
    single = [None if t is None else as_type(t, dtype).contiguous() for t in (beta, erase, read)]
    fade, decay_row, kind = _decay(log_decay, dtype)
    tensors = (
        *lines,
        *single,
        fade,
        None if bonus is None else as_type(bonus, dtype).contiguous(),
        o,
        state,
    )
    apart = [step for line in lines for step in (line.stride(0), line.stride(2))]
    sizes = (batch, heads, K, V, *apart, decay_row, kind, int(undecayed), float(scale))
    call("matrix_step", "step", dtype, tensors, *sizes)
    return as_type(o, v.dtype), state


def _in_order(line: Tensor) -> Tensor:
    """Any strides between rows and heads, none inside a head."""
    return line if line.stride(3) == 1 else line.contiguous()


def _decay(log_decay: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int, int]:
    """The decay as it lies, how far its rows are apart, and its kind."""
    if log_decay is None:
        return None, 0, NONE
    fade = as_type(log_decay, dtype).contiguous()
    if fade.ndim == 1:
        return fade, 0, ONE
    return fade, fade[0].numel(), ONE if fade.ndim == 3 else CHANNEL
