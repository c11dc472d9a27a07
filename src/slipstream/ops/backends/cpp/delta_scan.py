"""The delta rule by C++: in a block the triangular system is solved in registers, with the state at hand."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops import delta_scan as op
from slipstream.ops.backends.cpp.calls import offer, wants_gradient
from slipstream.ops.backends.cpp.matrix_state import scan, trains
from slipstream.ops.chunks import LogDecay
from slipstream.ops.dispatch import torch_forms


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: LogDecay | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """chunk_size is the kernel's own. With a decay a channel, gradients are the torch form's."""
    if wants_gradient(q, k, v, beta, log_decay, state) and not trains("delta_gradient", log_decay, v, state):
        with torch_forms():
            return op.delta_scan(q, k, v, beta, log_decay, state, lengths, scale, chunk_size)
    return scan("delta_scan", (q, k, v), log_decay, state, lengths, scale, lines=(beta,))


offer("delta_scan", run)
