"""The projection every mixer is made of: torch's own, computed by the op `linear`, so that one token can be made faster."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slipstream.ops.linear import linear


class Linear(nn.Linear):
    """y = x W^T + bias; weights are named, shaped and initialised as nn.Linear's."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what it reads and gives."""
        return self.weight.dtype

    def forward(self, x: Float[Tensor, "*A I"]) -> Float[Tensor, "*A O"]:  # type: ignore[override]
        return linear(x, self.weight, self.bias)
