"""One token of dplr_scan by C++."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import offer
from slipstream.ops.backends.cpp.matrix_step import matrix_step
from slipstream.ops.delta_scan import known


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float = 1.0,
    erase: str = "decayed",
) -> tuple[Tensor, Tensor]:
    undecayed = known(erase) == "undecayed"
    return matrix_step(q, k, v, log_decay, state, scale, erase=write, read=read, undecayed=undecayed)


offer("dplr_step", run, kernel="matrix_step", gradients=False)
