"""The projection of few rows, a token that is being written, by C++: as fast as the matrix can be read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.ops.backends.cpp.calls import call, offer

MOST = 4  # rows; more of them torch does better, as one product of matrices
SMALL = 1 << 14  # numbers in a matrix that torch has read before a kernel is called


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    outputs, inputs = weight.shape
    few = 0 < x.numel() <= MOST * inputs and x.shape[-1] == inputs
    if (
        not few
        or inputs * outputs < SMALL
        or _strange(weight, x.dtype)
        or (bias is not None and _strange(bias, x.dtype))
    ):
        return F.linear(x, weight, bias)  # which also says what is wrong, where something is
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    call("linear", "forward", x.dtype, (x.contiguous(), weight, bias, y), x.numel() // inputs, inputs, outputs)
    return y


def _strange(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel cannot read it where it lies."""
    return weight.dtype is not dtype or not weight.is_cpu or not weight.is_contiguous()


offer("linear", run, gradients=False)
