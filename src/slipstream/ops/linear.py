r"""The projection of every token by one matrix, which is where most of a model's time goes.

    y = x W^T + bias

Many rows are one matrix product, which torch does as well as it can be done. One row, a token that is being written, is
bound by how fast the matrix is read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from slipstream.ops.dispatch import operator


@operator("x")
def linear(
    x: Float[Tensor, "*A I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None
) -> Float[Tensor, "*A O"]:
    """y (..., O) in x's dtype, which is the weight's."""
    return F.linear(x, weight, bias)


def reference(
    x: Float[Tensor, "*A I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None = None
) -> Float[Tensor, "*A O"]:
    """Row by row of the matrix."""
    rows = [(x * row).sum(-1) + (0 if bias is None else bias[o]) for o, row in enumerate(weight)]
    return torch.stack(rows, -1)
