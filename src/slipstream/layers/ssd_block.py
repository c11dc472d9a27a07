r"""What stands around the recurrence in Mamba-2's block (Dao & Gu 2024, arXiv:2405.21060, sec. 7).

    z, xBC, dt, more = W_in u        x, B, C = silu(conv(xBC))        dt = softplus(dt + dt_bias)
    o = recurrence(q = C, k = B, v = dt x, log_decay = -exp(A_log) dt)        y = W_out (rms_norm((o + D x) * silu(z)))

B and C are shared by the heads of a group, and the norm is over the channels of a group. The weights are the mixer's own,
named and laid out as those of transformers' Mamba2Mixer; `more` numbers a head follow dt in in_proj. The plain recurrence is
here too (ssd, ssd_one, ssd_reference): Mamba-2 is nothing else, and hybrids have it beside attention.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mode
from slipstream.core.state import Slot
from slipstream.layers.decay_gate import time_steps
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step
from slipstream.ops.outer_scan import reference as outer_reference
from slipstream.ops.rms_norm import rms_norm
from slipstream.ops.silu_gate import silu_gate

NO_WEIGHT_DECAY = ("A_log", "D", "dt_bias")
GateNorm = Literal["after_gate", "before_gate", "none"]


class SSDConfig(MixerConfig):
    """Settings of every mixer with this block."""

    expand: int = 2  # inner width / d_model
    d_inner: PositiveInt | None = None  # inner width, where it is no multiple of d_model (Nemotron-H, Falcon-H1)
    n_heads: int | None = None  # heads, one decay each; default inner width / 64
    n_groups: int = 1  # groups of heads that share B and C
    d_state: int = 128  # width of B and C
    conv_size: int = 4  # width of the short convolution
    bias: bool = False  # biases on the projections in and out
    conv_bias: bool = True  # a bias on the short convolution
    norm: GateNorm = "after_gate"  # of the output: after_gate, before_gate or none (Falcon-H1), which gates alone
    norm_eps: PositiveFloat = 1e-5  # added under its root
    dt_min: NonNegativeFloat = 0.0  # the step size is never below this (Zamba2 and Nemotron-H in transformers: 0.001)
    dt_max: PositiveFloat | None = None  # nor above this
    chunk_size: int = 64  # tokens of one matrix product; no result depends on it

    @property
    def inner(self) -> int:
        return self.d_inner or self.expand * self.d_model


@runtime_checkable
class Block(Protocol):
    """A module with the block's weights; its norm is None where there is none."""

    in_proj: Linear
    conv1d: ShortConv
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter
    norm: RMSNorm | None
    out_proj: Linear


class SSDBlock(nn.Module):
    """The weights alone, for a mixer that has more than them."""

    in_proj: Linear
    conv1d: ShortConv
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter
    norm: RMSNorm | None
    out_proj: Linear

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.n_heads, self.head_dim = add_block(self, config)


def add_block(mixer: nn.Module, config: SSDConfig, more: int = 0) -> tuple[int, int]:
    """Give the mixer the block's weights; the number of heads, and the width of one."""
    d_inner = config.inner
    n_heads = heads(d_inner, config.n_heads)
    if config.n_groups < 1 or n_heads % config.n_groups:
        raise InputError(f"n_heads {n_heads} does not divide into n_groups {config.n_groups}")
    convolved = d_inner + 2 * config.n_groups * config.d_state
    mixer.in_proj = Linear(config.d_model, d_inner + convolved + n_heads * (1 + more), bias=config.bias)
    mixer.conv1d = ShortConv(convolved, config.conv_size, bias=config.conv_bias)
    mixer.dt_bias = time_steps(n_heads)
    mixer.A_log = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
    mixer.D = nn.Parameter(torch.ones(n_heads))
    mixer.add_module("norm", None if config.norm == "none" else RMSNorm(d_inner, eps=config.norm_eps))
    mixer.out_proj = Linear(d_inner, config.d_model, bias=config.bias)
    return n_heads, d_inner // n_heads


def projected(block: Block, config: SSDConfig, u: Float[Tensor, "B T D"]) -> tuple[Tensor, ...]:
    """z, xBC, dt before its bias, and more."""
    d_inner, n_heads = config.inner, len(block.D)
    convolved = block.conv1d.in_channels
    return block.in_proj(u).tensor_split([d_inner, d_inner + convolved, d_inner + convolved + n_heads], -1)


def selected(
    block: Block, config: SSDConfig, xBC: Float[Tensor, "B T C"], dt: Float[Tensor, "B T H"]
) -> tuple[Float[Tensor, "B T H V"], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """x by heads, and what the rule takes: C, B, dt x and dt A; the last two in float32 at least."""
    n_heads, width = len(block.D), config.n_groups * config.d_state
    x, B, C = xBC.split([config.inner, width, width], -1)
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = F.softplus(dt.to(wide) + block.dt_bias)
    if config.dt_min or config.dt_max:
        dt = dt.clamp(config.dt_min, config.dt_max)
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
    if block.norm is None:
        return block.out_proj(silu_gate(skipped, z))
    weight, eps, gate_first = block.norm.weight, block.norm.eps, config.norm == "after_gate"
    if config.n_groups == 1:
        return block.out_proj(rms_norm(skipped, weight, eps, z, gate_first))
    groups = (silu_gate(skipped, z) if gate_first else skipped).unflatten(-1, (config.n_groups, -1))
    normed = rms_norm(groups, eps=eps).flatten(2) * weight
    return block.out_proj(normed if gate_first else silu_gate(normed, z))


def ssd_slots(block: Block, config: SSDConfig) -> dict[str, Slot]:
    """The state of the plain recurrence, and the convolution's."""
    n_heads = len(block.D)
    return {"S": Slot((n_heads, config.d_state, config.inner // n_heads)), "conv": block.conv1d.slot()}


def ssd(
    block: Block,
    config: SSDConfig,
    lines: tuple[Tensor, ...],
    S: Float[Tensor, "B H N P"],
    conv: Tensor,
    lengths: Int[Tensor, "B"] | None,
) -> tuple[Float[Tensor, "B T D"], dict[str, Tensor]]:
    """The whole block from what `projected` gives: outputs, and the slots after each row's last token."""
    z, xBC, dt, _ = lines
    xBC, conv = block.conv1d(xBC, conv, lengths)
    u, rule = selected(block, config, xBC, dt)
    o, S = outer_scan(*rule, S, lengths, chunk_size=config.chunk_size)
    return output(block, config, o, u, z), {"S": S, "conv": conv}


def ssd_one(
    block: Block, config: SSDConfig, lines: tuple[Tensor, ...], S: Float[Tensor, "B H N P"], conv: Tensor
) -> tuple[Float[Tensor, "B 1 D"], dict[str, Tensor]]:
    """One token of it."""
    z, xBC, dt, _ = lines
    xBC, conv = block.conv1d(xBC, conv)
    u, rule = selected(block, config, xBC, dt)
    o, S = outer_step(*rule, S)
    return output(block, config, o, u, z), {"S": S, "conv": conv}


def ssd_reference(block: Block, config: SSDConfig, lines: tuple[Tensor, ...]) -> Float[Tensor, "B T D"]:
    """The same over a whole sequence, token by token."""
    z, xBC, dt, _ = lines
    u, rule = selected(block, config, block.conv1d.reference(xBC), dt)
    return output(block, config, outer_reference(*rule)[0], u, z)


def ssd_flops(config: SSDConfig, n_heads: int, T: int, B: int, mode: Mode) -> float:
    """Of the recurrence's matrix products."""
    return outer_flops(T, B, n_heads, config.d_state, config.inner // n_heads, mode, "head", config.chunk_size)
