"""The short depthwise convolution by C++: every input is read once, where torch's form passes over them once a tap."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.backends.cpp.calls import as_type, blank, call, offer, rows, wants_gradient
from slipstream.ops.valid import last_tokens, zero_padding

BLOCK = 128  # as in causal_conv.cpp


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = False,
) -> tuple[Tensor, Tensor]:
    past = weight.shape[1] - 1
    state = x.new_zeros(x.shape[0], past, x.shape[2]) if state is None else as_type(state, x.dtype).contiguous()
    taps = (as_type(weight, x.dtype).contiguous(), None if bias is None else as_type(bias, x.dtype).contiguous())
    if wants_gradient(x, weight, bias, state):
        kept = _kept(x, state, past, lengths)
        y = x if 0 in x.shape else _CausalConv.apply(x.contiguous(), *taps, state, lengths)
        return (F.silu(y) if activation else y), kept
    (x, apart), kept = rows(x), torch.empty_like(state)
    y = blank(x)
    tensors = (x, *taps, state, lengths, y, kept)
    if x.shape[1] == 0:
        return y, state
    call("causal_conv", "forward", x.dtype, tensors, *x.shape, weight.shape[1], apart, int(activation))
    return y, kept


def _kept(x: Tensor, state: Tensor, past: int, lengths: Tensor | None) -> Tensor:
    """The inputs before each row's end."""
    if lengths is not None:
        return last_tokens(torch.cat([state, zero_padding(x, lengths)], 1), past, lengths)
    tail = x[:, max(0, x.shape[1] - past) :]
    return torch.cat([state[:, tail.shape[1] :], tail], 1)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, lengths: Tensor | None
    ) -> Tensor:
        y = torch.empty_like(x)
        sizes = (*x.shape, weight.shape[1], x.shape[2], 0)
        call("causal_conv", "forward", x.dtype, (x, weight, bias, state, lengths, y, None), *sizes)
        ctx.save_for_backward(x, weight, state, lengths)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, state, lengths = ctx.saved_tensors
        pieces = (x.shape[0], -(-x.shape[1] // BLOCK))
        gx, g_state = torch.empty_like(x), torch.empty_like(state)
        g_weight, g_bias = x.new_zeros(*pieces, *weight.mT.shape), x.new_zeros(*pieces, x.shape[2])
        tensors = (x, weight, state, lengths, gy.contiguous(), gx, g_weight, g_bias, g_state)
        call("causal_conv", "backward", x.dtype, tensors, *x.shape, weight.shape[1])
        return gx, g_weight.sum((0, 1)).mT, g_bias.sum((0, 1)) if ctx.has_bias else None, g_state, None


offer("causal_conv", run)
