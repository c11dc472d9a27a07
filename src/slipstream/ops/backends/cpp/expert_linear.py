"""Few rows, each by the matrix of its own expert, on a CPU: matrices are read where they lie, and only those that were chosen."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import as_type, call, offer


def run(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    n_experts, outputs, inputs = weight.shape
    y = rows.new_empty(*experts.shape, outputs)
    tensors = (rows.contiguous(), as_type(weight, rows.dtype).contiguous(), experts.long().contiguous(), y)
    call("linear", "by_experts", rows.dtype, tensors, experts.numel(), inputs, outputs, n_experts)
    return y


offer("expert_linear", run, kernel="linear", gradients=False)
