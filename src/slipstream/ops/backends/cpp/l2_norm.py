"""Unit length by C++: the kernel of rms_norm, with another divisor."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import offer
from slipstream.ops.backends.cpp.rms_norm import normed


def run(x: Tensor, eps: float = 1e-6) -> Tensor:
    return normed(x, None, None, eps, 1, False)


offer("l2_norm", run, kernel="rms_norm")
