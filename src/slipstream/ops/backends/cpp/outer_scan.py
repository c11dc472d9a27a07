"""Linear attention's matrix state by C++: heads go through all of time with their states and one block in the cache."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import offer
from slipstream.ops.backends.cpp.matrix_state import scan
from slipstream.ops.chunks import LogDecay


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
    """chunk_size is the kernel's own."""
    return scan("outer_scan", (q, k, v), log_decay, state, lengths, scale, constants=(bonus,))


offer("outer_scan", run, gradients=False)
