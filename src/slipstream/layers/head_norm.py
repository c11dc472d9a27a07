"""Group norm with one group a head: what retention and RWKV put on the output of their heads."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class HeadNorm(nn.GroupNorm):
    """Each head of each token to mean 0 and variance 1, then weight and bias per channel. Weights as nn.GroupNorm's."""

    def forward(self, o: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T D"]:  # type: ignore[override]
        return super().forward(o.flatten(2).flatten(0, 1)).unflatten(0, o.shape[:2])
