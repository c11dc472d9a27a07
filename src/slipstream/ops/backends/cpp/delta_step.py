"""One token of delta_scan by C++."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import offer
from slipstream.ops.backends.cpp.matrix_step import matrix_step


def run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    return matrix_step(q, k, v, log_decay, state, scale, beta=beta)


offer("delta_step", run, kernel="matrix_step", gradients=False)
