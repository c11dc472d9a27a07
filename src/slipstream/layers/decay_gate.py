r"""The decay gate of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060) and its heirs: a learned rate, a time that is read.

log_decay = -exp(A_log) * softplus(a + dt_bias)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

NO_WEIGHT_DECAY = ("A_log", "dt_bias")  # shrinking them would pull every memory to one length


def decay_rates(n: int) -> nn.Parameter:
    """A_log, with rates drawn evenly from (0.01, 16)."""
    return nn.Parameter(torch.empty(n).uniform_(0.01, 16).log())


def time_steps(n: int) -> nn.Parameter:
    """dt_bias, the inverse softplus of times drawn evenly by their logarithm from (0.001, 0.1)."""
    dt = torch.empty(n).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
    return nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


def log_decay(a: Float[Tensor, "*A"], A_log: Tensor, dt_bias: Tensor) -> Float[Tensor, "*A"]:
    """In float32 at least; A_log and dt_bias broadcast to a."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return -A_log.to(wide).exp() * F.softplus(a.to(wide) + dt_bias.to(wide))
