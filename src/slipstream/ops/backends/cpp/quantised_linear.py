"""The projection by a quantised matrix in C++: products of bytes, for which the matrix is never made again."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.ops.backends.cpp.calls import call, offer
from slipstream.ops.backends.cpp.library import library
from slipstream.ops.quantised_linear import dequantise

FEW = 8  # rows that a CPU without products of bytes serves better by the codes


def run(x: Tensor, codes: Tensor, scales: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    inputs, four = x.shape[-1], codes.dtype is torch.uint8
    tokens = x.numel() // inputs
    if tokens > FEW and not _multiplies_bytes():
        return F.linear(x, dequantise(codes, scales, outputs, inputs, x.dtype), bias)
    y = torch.empty((*x.shape[:-1], outputs))
    group = codes.shape[1] * (8 if four else 4) // scales.shape[1]
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    tensors = (x.contiguous(), codes.contiguous(), scales.contiguous(), bias, y)
    call("quantised_linear", "forward", torch.float32, tensors, tokens, inputs, outputs, group, four)
    return y


@functools.cache
def _multiplies_bytes() -> bool:
    found = library("quantised_linear")
    return found is not None and bool(found.multiplies_bytes())


offer("quantised_linear", run, (torch.float32,), gradients=False)
