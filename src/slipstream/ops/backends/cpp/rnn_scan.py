"""Elman networks by C++: the products of the tokens are torch's, the loop is semilinear_scan's with all of it squashed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from slipstream.ops.backends.cpp import semilinear_scan
from slipstream.ops.backends.cpp.calls import as_type, offer
from slipstream.ops.backends.cpp.semilinear_scan import SHORT
from slipstream.ops.dispatch import torch_forms
from slipstream.ops.nonlinear_scan import rnn_scan
from slipstream.ops.valid import zero_padding


def run(x: Tensor, weights: list[Tensor], state: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if x.shape[1] < SHORT:
        with torch_forms():
            return rnn_scan(x, weights, state, lengths)
    W, U, b, b2 = (as_type(w, x.dtype) for w in weights)
    into = F.linear(zero_padding(x, lengths), W, b + b2)
    return semilinear_scan.run(into, U, U.shape[0], state, lengths)


offer("rnn_scan", run, kernel="semilinear_scan")
