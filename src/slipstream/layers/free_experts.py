r"""Experts without work: a token that chooses one of them has nothing computed, keeps itself, or takes a learnt vector.

    null: 0        copy: x        constant: a_1 x + a_2 v        (a_1, a_2) = softmax(W_c x)

Jin et al. 2024 (MoE++), arXiv:2410.07348, sec. 3.1; null experts also Zeng et al. 2024 (AdaMoE), arXiv:2406.13233, copies the
zero-computation experts of LongCat-Flash, arXiv:2509.01322. They are numbered in this order, after the experts that work.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slipstream.layers.linear import Linear


class FreeExperts(nn.Module):
    """n_null + n_copy + n_constant of them."""

    def __init__(self, d_model: int, n_null: int, n_copy: int, n_constant: int) -> None:
        super().__init__()
        self.counts = (n_null, n_copy, n_constant)
        if n_constant:
            self.constants = nn.Parameter(torch.randn(n_constant, d_model))
            self.blend = Linear(d_model, 2 * n_constant, bias=False)

    @property
    def n_experts(self) -> int:
        return sum(self.counts)

    def forward(self, x: Float[Tensor, "*A D"], weights: Float[Tensor, "*A Z"]) -> Float[Tensor, "*A D"]:
        """weights: of each of them, zero where it was not chosen."""
        _, copy, constant = weights.split(self.counts, -1)
        y = copy.sum(-1, keepdim=True) * x
        if not self.counts[2]:
            return y
        kept, taken = (constant[..., None] * self.blend(x).unflatten(-1, (-1, 2)).softmax(-1)).unbind(-1)
        return y + kept.sum(-1, keepdim=True) * x + taken @ self.constants

    def reference(self, x: Float[Tensor, "D"], i: int) -> Float[Tensor, "D"]:
        """The i-th of them on one token."""
        n_null, n_copy, _ = self.counts
        if i < n_null + n_copy:
            return torch.zeros_like(x) if i < n_null else x
        i -= n_null + n_copy
        a = (self.blend.weight[2 * i : 2 * i + 2] @ x).softmax(0)
        return a[0] * x + a[1] * self.constants[i]

    def flops(self, tokens: int) -> float:
        return 2.0 * tokens * self.constants.numel() if self.counts[2] else 0.0
