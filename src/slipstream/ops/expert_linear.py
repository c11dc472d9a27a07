r"""Few rows, each by the weight of an expert of its own; weights are stored (E O I), as those of E linear layers.

    y_n = W_{e_n} x_n        zero where e_n is E or more: no expert

In static shapes, and without asking the host who chose what. Rows sorted by expert, for whole sequences, are in ops/route.py
and ops/expert_mlp.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.ops.dispatch import operator


@operator("rows")
def expert_linear(
    rows: Float[Tensor, "*B I"], weight: Float[Tensor, "E O I"], experts: Int[Tensor, "*B"]
) -> Float[Tensor, "*B O"]:
    """Each row by a copy of its expert's weight; on a CPU, where no gradients are wanted, without copies."""
    n_experts = weight.shape[0]
    y = torch.einsum("...i,...oi->...o", rows, weight[experts.clamp(max=n_experts - 1)])
    return y.masked_fill((experts >= n_experts)[..., None], 0.0)


def reference(
    rows: Float[Tensor, "*B I"], weight: Float[Tensor, "E O I"], experts: Int[Tensor, "*B"]
) -> Float[Tensor, "*B O"]:
    """Row by row."""
    none = rows.new_zeros(weight.shape[1])
    pairs = zip(experts.flatten().tolist(), rows.flatten(0, -2))
    ys = [F.linear(row, weight[e]) if e < len(weight) else none for e, row in pairs]
    return torch.stack(ys).reshape(*experts.shape, -1) if ys else rows.new_zeros(*experts.shape, weight.shape[1])
