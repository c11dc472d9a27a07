r"""What Mamba's tokens choose for themselves: how far time goes on, what is written, and what is read.

    r, B, C = W_x x        dt = softplus(W_dt r + b_dt)        A = -exp(A_log)

With norms, r, B and C pass an RMS norm each, which large models need to train (Jamba, arXiv:2403.19887, sec. 6.4; without
weights in Falcon Mamba). The weights are the mixer's own, named as in transformers' MambaMixer and JambaMambaMixer.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from slipstream.layers.decay_gate import time_steps
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm


@runtime_checkable
class Selective(Protocol):
    """A module with the weights; its norms are None where there are none."""

    x_proj: Linear
    dt_proj: Linear
    A_log: nn.Parameter
    dt_layernorm: RMSNorm | None
    b_layernorm: RMSNorm | None
    c_layernorm: RMSNorm | None


def add_selection(
    mixer: nn.Module, d_model: int, d_inner: int, d_state: int, dt_rank: int | None, norm_eps: float | None
) -> None:
    """Give the mixer the weights. dt_rank None: d_model / 16; norm_eps None: no norms."""
    rank = dt_rank or math.ceil(d_model / 16)
    mixer.x_proj = Linear(d_inner, rank + 2 * d_state, bias=False)
    mixer.dt_proj = Linear(rank, d_inner)
    mixer.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
    nn.init.uniform_(mixer.dt_proj.weight, -(rank**-0.5), rank**-0.5)
    mixer.dt_proj.bias = time_steps(d_inner)
    for name, size in (("dt", rank), ("b", d_state), ("c", d_state)):
        mixer.add_module(f"{name}_layernorm", None if norm_eps is None else RMSNorm(size, norm_eps))


def selected(block: Selective, x: Float[Tensor, "*A I"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dt, A, B, C; the first two in float32 at least."""
    dt, A, B, C = before_softplus(block, x)
    return F.softplus(dt), A, B, C


def before_softplus(block: Selective, x: Float[Tensor, "*A I"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with W_dt r + b_dt for dt."""
    rank, d_state = block.dt_proj.in_features, block.A_log.shape[1]
    r, B, C = block.x_proj(x).split([rank, d_state, d_state], -1)
    if block.dt_layernorm and block.b_layernorm and block.c_layernorm:
        r, B, C = block.dt_layernorm(r), block.b_layernorm(B), block.c_layernorm(C)
    wide = torch.promote_types(x.dtype, torch.float32)
    return block.dt_proj(r).to(wide), -torch.exp(block.A_log.to(wide)), B, C
