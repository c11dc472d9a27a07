"""Attention to a window by C++. Only without gradients: the torch form trains."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import offer
from slipstream.ops.backends.cpp.range_attention import range_attention
from slipstream.ops.softmax import PLAIN, Softmax


def run(q: Tensor, k: Tensor, v: Tensor, past: Tensor, window: int, softmax: Softmax = PLAIN) -> Tensor:
    return range_attention(q, k, v, past, softmax, window)


offer("window_attention", run, kernel="attention", gradients=False)
