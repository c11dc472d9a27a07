"""Few rows, each by the weight of its own expert, on a CPU: the kernel of `linear` reads them where they lie."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.backends.cpp.calls import offer
from slipstream.ops.linear import linear


def run(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    y = rows.new_zeros(*experts.shape, weight.shape[1])
    served: dict[int, list[int]] = {}
    for n, e in enumerate(experts.flatten().tolist()):  # tensors of a CPU are the host's: nothing is waited for
        served.setdefault(e, []).append(n)
    flat, out = rows.reshape(-1, rows.shape[-1]), y.view(-1, weight.shape[1])
    for e, (first, *others) in served.items():
        if e < len(weight):
            own = [first, *others] if others else slice(first, first + 1)
            out[own] = linear(flat[own], weight[e])
    return y


offer("expert_linear", run, kernel="linear", gradients=False)
