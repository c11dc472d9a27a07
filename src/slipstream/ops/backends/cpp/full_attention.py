"""Attention to all of the past by C++. Only without gradients: torch's own form trains."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.ops.backends.cpp.calls import offer
from slipstream.ops.backends.cpp.range_attention import range_attention
from slipstream.ops.softmax import Softmax


def run(
    q: Tensor, k: Tensor, v: Tensor, past: Tensor | None, causal: bool, lengths: Tensor | None, softmax: Softmax
) -> Tensor:
    if past is None and lengths is None and not causal:  # all keys, however many queries there are
        lengths = torch.full((len(q),), k.shape[1])
    return range_attention(q, k, v, past, softmax, causal=causal, lengths=lengths)


offer("full_attention", run, kernel="attention", gradients=False)
