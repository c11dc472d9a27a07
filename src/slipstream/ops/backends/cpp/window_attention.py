"""Attention to a window by C++. Only without gradients: the torch form trains."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.attention import window_attention
from slipstream.ops.backends.cpp.calls import offer, wants_gradient
from slipstream.ops.backends.cpp.range_attention import range_attention
from slipstream.ops.dispatch import torch_forms
from slipstream.ops.softmax import PLAIN, Softmax


def run(q: Tensor, k: Tensor, v: Tensor, past: Tensor, window: int, softmax: Softmax = PLAIN) -> Tensor:
    if wants_gradient(softmax.sinks):
        with torch_forms():
            return window_attention(q, k, v, past, window, softmax)
    return range_attention(q, k, v, past, softmax, window)


offer("window_attention", run, kernel="attention", gradients=False)
