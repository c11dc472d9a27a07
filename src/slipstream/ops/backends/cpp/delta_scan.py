"""The delta rule by C++: in a block the triangular system is solved in registers, with the state at hand."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import offer
from slipstream.ops.backends.cpp.matrix_state import scan
from slipstream.ops.chunks import LogDecay


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
    """chunk_size is the kernel's own."""
    return scan("delta_scan", (q, k, v), log_decay, state, lengths, scale, lines=(beta,))


offer("delta_scan", run, gradients=False)
