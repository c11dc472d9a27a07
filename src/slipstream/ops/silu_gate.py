r"""A gate by the sigmoid-weighted unit: of feed-forwards (SwiGLU, Shazeer 2020, arXiv:2002.05202) and of mixers' outputs.

y = x * gate * sigmoid(gate)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from slipstream.ops.dispatch import operator


@operator("x", "gate")
def silu_gate(x: Float[Tensor, "*A D"], gate: Float[Tensor, "*A D"]) -> Float[Tensor, "*A D"]:
    return F.silu(gate) * x


def reference(x: Float[Tensor, "*A D"], gate: Float[Tensor, "*A D"]) -> Float[Tensor, "*A D"]:
    return x * gate / (1 + torch.exp(-gate))
