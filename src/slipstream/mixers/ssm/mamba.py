r"""Mamba (S6): a diagonal state space whose step size, input and output matrices are chosen by every token.

    x, z = W_in u        x = silu(conv(x))        r_t, B_t, C_t = W_x x_t        dt_t = softplus(W_dt r_t + b_dt)
    h_t = exp(dt_t A) * h_{t-1} + dt_t B_t x_t    y_t = W_out ((C_t . h_t + D * x_t) * silu(z_t))

State space files keep the paper's letters: C is the query, B the key, x the value. A is real and negative (A =
-exp(A_log)). With negative_eigenvalues the decay is 2 exp(dt_t A) - 1, from -1 to 1: what parities need (Grazzi et al.).
Names and layout of the weights are those of transformers' MambaMixer and of the authors' code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.decay_gate import time_steps
from slipstream.layers.linear import Linear
from slipstream.layers.mamba_block import block_reference, through_block
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.selective_scan import reference as selective_reference
from slipstream.ops.selective_scan import selective_scan, selective_scan_flops, selective_step


class Mamba(Mixer, name="mamba", family="ssm"):
    paper = (
        "Gu & Dao 2023, arXiv:2312.00752, algorithm 2, sections 3.4, 3.6; signed: Grazzi et al. 2024, arXiv:2411.12537"
    )
    use_when = "long streams of text, audio or DNA with constant memory, where what matters is chosen by content"
    writes, erases = "dt x B^T", "nothing"
    decays, reads = "a number a channel and state, from x", "h C"
    symbols = {"Δ": "dt", "E": "expand", "N": "d_state", "A": "-exp(A_log)"}
    oracle = "transformers MambaMixer, test_ssm_rnn_oracles.py; with negative eigenvalues a numpy loop, state_space.npz"
    no_weight_decay = ("A_log", "D", "bias")

    class Config(MixerConfig):
        expand: int = 2  # inner width / d_model
        d_state: int = 16  # numbers of state per inner channel
        conv_size: int = 4  # width of the short convolution
        dt_rank: int | None = None  # width through which the step size is made; default d_model / 16
        negative_eigenvalues: bool = False  # decays from -1 to 1 instead of 0 to 1, so that parities can be tracked
        chunk_size: int = 16  # tokens expanded at a time; no result depends on it

    config: Config
    tiny = Config(d_model=16, d_state=4, conv_size=3, dt_rank=2, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.d_inner = config.expand * config.d_model
        self.dt_rank = config.dt_rank or math.ceil(config.d_model / 16)
        self.in_proj = Linear(config.d_model, 2 * self.d_inner, bias=False)
        self.conv1d = ShortConv(self.d_inner, config.conv_size, bias=True)
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, config.d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = Linear(self.d_inner, config.d_model, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.dt_proj.bias = time_steps(self.d_inner)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.d_inner, self.config.d_state)), "conv": self.conv1d.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        size, signed = self.config.chunk_size, self.config.negative_eigenvalues
        return through_block(
            self, x, state, lengths, lambda x: selective_scan(x, *self._selected(x), state["h"], lengths, size, signed)
        )

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        return through_block(self, x, state, None, lambda x: self._one(x, state["h"]))

    def _one(self, x: Float[Tensor, "B 1 I"], h: Tensor) -> tuple[Tensor, Tensor]:
        dt, A, B, C = self._selected(x)
        o, h = selective_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], h, self.config.negative_eigenvalues)
        return o[:, None], h

    def _selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt, A, B, C; the first two in float32 at least."""
        r, B, C = self.x_proj(x).split([self.dt_rank, self.config.d_state, self.config.d_state], -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.softplus(self.dt_proj(r).to(wide)), -torch.exp(self.A_log.to(wide)), B, C

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        start = x.new_zeros(x.shape[0], self.d_inner, self.config.d_state)
        signed = self.config.negative_eigenvalues
        return block_reference(self, x, lambda x: selective_reference(x, *self._selected(x), start, signed))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return selective_scan_flops(B if mode == "step" else B * T, self.d_inner, self.config.d_state)
