r"""The most that a query can give any key of a page, of which only the least and the largest number a channel are known.

    b_p = max over the queries of a key head of sum_i max(q_i low_pi, q_i high_pi)

Quest, Tang et al. 2024, arXiv:2406.10774, sec. 3.2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from slipstream.ops.dispatch import operator


@operator()
def page_bounds(
    q: Float[Tensor, "B 1 H K"], low: Float[Tensor, "B P G K"], high: Float[Tensor, "B P G K"]
) -> Float[Tensor, "B G P"]:
    """G key heads serve H query heads (G divides H). In float32 at least."""
    grouped = q[:, 0].unflatten(1, (low.shape[2], -1)).to(torch.promote_types(q.dtype, torch.float32))
    sides = (
        (grouped.clamp(min=0), high),
        (grouped.clamp(max=0), low),
    )  # the larger of two products is that with one of them
    up, down = (torch.einsum("bgrk,bpgk->bgrp", half, side.to(half.dtype)) for half, side in sides)
    return (up + down).amax(2)


def reference(
    q: Float[Tensor, "B 1 H K"], low: Float[Tensor, "B P G K"], high: Float[Tensor, "B P G K"]
) -> Float[Tensor, "B G P"]:
    """Page by page and head by head."""
    shared = q.shape[2] // low.shape[2]
    bounds = low.new_zeros(len(low), low.shape[2], low.shape[1])
    for b, p, g in torch.cartesian_prod(*map(torch.arange, low.shape[:3])).tolist():
        own = q[b, 0, g * shared : (g + 1) * shared]
        bounds[b, g, p] = torch.maximum(own * low[b, p, g], own * high[b, p, g]).sum(-1).max()
    return bounds
