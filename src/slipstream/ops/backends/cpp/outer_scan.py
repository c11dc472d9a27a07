"""Linear attention's matrix state by C++: heads go through all of time with their states and one block in the cache."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops import outer_scan as op
from slipstream.ops.backends.cpp.calls import offer, wants_gradient
from slipstream.ops.backends.cpp.matrix_state import scan, trains
from slipstream.ops.chunks import LogDecay
from slipstream.ops.dispatch import torch_forms


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: LogDecay | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """chunk_size is the kernel's own. With a bonus, or a decay a channel, gradients are the torch form's."""
    if wants_gradient(q, k, v, log_decay, state, bonus) and not (
        bonus is None and trains("outer_gradient", log_decay, v, state)
    ):
        with torch_forms():
            return op.outer_scan(q, k, v, log_decay, state, lengths, scale, chunk_size, bonus)
    return scan("outer_scan", (q, k, v), log_decay, state, lengths, scale, constants=(bonus,))


offer("outer_scan", run)
