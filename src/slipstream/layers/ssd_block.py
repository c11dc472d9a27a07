r"""What stands around the recurrence in Mamba-2's block (Dao & Gu 2024, arXiv:2405.21060, sec. 7).

    z, xBC, dt, more = W_in u        x, B, C = silu(conv(xBC))        dt = softplus(dt + dt_bias)
    o = recurrence(q = C, k = B, v = dt x, log_decay = -exp(A_log) dt)        y = W_out (rms_norm((o + D x) * silu(z)))

B and C are shared by the heads of a group, and the norm is over the channels of a group. The weights are the mixer's own,
named and laid out as those of transformers' Mamba2Mixer; `more` numbers a head follow dt in in_proj.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer
from slipstream.layers.decay_gate import time_steps
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.rms_norm import rms_norm
from slipstream.ops.silu_gate import silu_gate

NO_WEIGHT_DECAY = ("A_log", "D", "dt_bias")


class SSDConfig(MixerConfig):
    """Settings of every mixer with this block."""

    expand: int = 2  # inner width / d_model
    n_heads: int | None = None  # heads, one decay each; default inner width / 64
    n_groups: int = 1  # groups of heads that share B and C
    d_state: int = 128  # width of B and C
    conv_size: int = 4  # width of the short convolution
    chunk_size: int = 64  # tokens of one matrix product; no result depends on it


@runtime_checkable
class Block(Protocol):
    """A mixer with the block's weights."""

    in_proj: Linear
    conv1d: ShortConv
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter
    norm: RMSNorm
    out_proj: Linear


def add_block(mixer: Mixer, config: SSDConfig, more: int = 0) -> tuple[int, int]:
    """Give the mixer the block's weights; the number of heads, and the width of one."""
    d_inner = config.expand * config.d_model
    n_heads = heads(d_inner, config.n_heads)
    if config.n_groups < 1 or n_heads % config.n_groups:
        raise InputError(f"n_heads {n_heads} does not divide into n_groups {config.n_groups}")
    convolved = d_inner + 2 * config.n_groups * config.d_state
    mixer.in_proj = Linear(config.d_model, d_inner + convolved + n_heads * (1 + more), bias=False)
    mixer.conv1d = ShortConv(convolved, config.conv_size, bias=True)
    mixer.dt_bias = time_steps(n_heads)
    mixer.A_log = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
    mixer.D = nn.Parameter(torch.ones(n_heads))
    mixer.norm = RMSNorm(d_inner, eps=1e-5)
    mixer.out_proj = Linear(d_inner, config.d_model, bias=False)
    return n_heads, d_inner // n_heads


def projected(block: Block, config: SSDConfig, u: Float[Tensor, "B T D"]) -> tuple[Tensor, ...]:
    """z, xBC, dt before its bias, and more."""
    d_inner, n_heads = config.expand * config.d_model, len(block.D)
    convolved = block.conv1d.in_channels
    return block.in_proj(u).tensor_split([d_inner, d_inner + convolved, d_inner + convolved + n_heads], -1)


def selected(
    block: Block, config: SSDConfig, xBC: Float[Tensor, "B T C"], dt: Float[Tensor, "B T H"]
) -> tuple[Float[Tensor, "B T H V"], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """x by heads, and what the rule takes: C, B, dt x and dt A; the last two in float32 at least."""
    n_heads, width = len(block.D), config.n_groups * config.d_state
    x, B, C = xBC.split([config.expand * config.d_model, width, width], -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = F.softplus(dt.to(wide) + block.dt_bias)
    x, (B, C) = x.unflatten(-1, (n_heads, -1)), (_by_head(t, config.n_groups, n_heads) for t in (B, C))
    return x, (C, B, x * dt[..., None], -torch.exp(block.A_log.to(wide)) * dt)


def _by_head(x: Tensor, n_groups: int, n_heads: int) -> Float[Tensor, "B T H K"]:
    groups = x.unflatten(-1, (n_groups, 1, -1))
    return groups.expand(-1, -1, -1, n_heads // n_groups, -1).flatten(2, 3)


def output(
    block: Block, config: SSDConfig, o: Float[Tensor, "B T H V"], x: Tensor, z: Tensor
) -> Float[Tensor, "B T D"]:
    """Skip, gate, norm by groups, and the way out."""
    skipped = torch.addcmul(o.to(x.dtype), block.D[:, None], x).flatten(2)
    if config.n_groups == 1:
        return block.out_proj(rms_norm(skipped, block.norm.weight, block.norm.eps, z, gate_first=True))
    gated = silu_gate(skipped, z).unflatten(-1, (config.n_groups, -1))
    return block.out_proj(rms_norm(gated, eps=block.norm.eps).flatten(2) * block.norm.weight)
