"""Diagonal plus low rank by C++: as delta_scan, with keys of its own for what is erased."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import offer
from slipstream.ops.backends.cpp.matrix_state import scan
from slipstream.ops.chunks import LogDecay
from slipstream.ops.delta_scan import known


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: LogDecay | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
    erase: str = "decayed",
) -> tuple[Tensor, Tensor]:
    """chunk_size is the kernel's own."""
    early = known(erase) == "undecayed"
    return scan("dplr_scan", (q, k, v), log_decay, state, lengths, scale, lines=(read, write), flags=(early,))


offer("dplr_scan", run, gradients=False)
