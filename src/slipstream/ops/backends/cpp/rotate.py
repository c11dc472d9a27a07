"""Pairs turned by angles by C++, one pass over what is read and written; the gradient is turned back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import as_type, blank, call, offer, wants_gradient


def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (as_type(angle, x.dtype).contiguous() for angle in (cos, sin))
    return _Rotate.apply(x, cos, sin) if wants_gradient(x) else _turned(x, cos, sin, back=False)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    y = blank(x)
    call("rotate", "forward", x.dtype, (x, cos, sin, y), *x.shape, cos.shape[2], int(back), *x.stride()[:3])
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None, None]:
        return _turned(gy, *ctx.saved_tensors, back=True), None, None


offer("rotate", run)
