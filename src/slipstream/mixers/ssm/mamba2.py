r"""Mamba-2 (SSD): a selective state space with one decay per head, which makes it linear attention with a gate.

    z, xBC, dt = W_in u        x, B, C = silu(conv(xBC))        dt_t = softplus(dt_t + dt_bias)
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T                o_t = S_t^T C_t + D x_t
    y_t = W_out (rms_norm(o_t * silu(z_t)) * weight)

State space files keep the paper's letters: C is the query, B the key, x the value. B and C are shared by the heads of a
group, and the norm is over the channels of a group. Weights are named and laid out as those of transformers'
Mamba2Mixer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.decay_gate import time_steps
from slipstream.layers.norm import RMSNorm, rms_norm
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step
from slipstream.ops.outer_scan import reference as outer_reference


class Mamba2(Mixer, name="mamba2", family="ssm"):
    paper = "Dao & Gu 2024, arXiv:2405.21060, eq. 1 with scalar A, section 7, figure 6; norm by groups: authors' code"
    use_when = "long streams with constant memory and a state several times larger than Mamba's at the same speed"
    writes, erases = "B (dt x)^T", "nothing"
    decays, reads = "a number a head, from x", "S^T C"
    symbols = {"C": "q", "B": "k", "X": "x", "Δ": "dt", "P": "head_dim", "N": "d_state", "a": "exp(dt A)"}
    oracle = "transformers Mamba2Mixer, tests/oracles/test_ssm_rnn_oracles.py"
    no_weight_decay = ("A_log", "D", "dt_bias")

    class Config(MixerConfig):
        expand: int = 2  # inner width / d_model
        n_heads: int | None = None  # heads, one decay each; default inner width / 64
        n_groups: int = 1  # groups of heads that share B and C
        d_state: int = 128  # width of B and C
        conv_size: int = 4  # width of the short convolution
        chunk_size: int = 64  # tokens of one matrix product; no result depends on it

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_groups=2, d_state=6, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.d_inner = config.expand * config.d_model
        self.n_heads = heads(self.d_inner, config.n_heads)
        if config.n_groups < 1 or self.n_heads % config.n_groups:
            raise InputError(f"n_heads {self.n_heads} does not divide into n_groups {config.n_groups}")
        self.widths = [self.d_inner, config.n_groups * config.d_state, config.n_groups * config.d_state]
        self.in_proj = nn.Linear(config.d_model, self.d_inner + sum(self.widths) + self.n_heads, bias=False)
        self.conv1d = ShortConv(sum(self.widths), config.conv_size, bias=True)
        self.dt_bias = time_steps(self.n_heads)
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        head_dim = self.d_inner // self.n_heads
        return {"S": Slot((self.n_heads, self.config.d_state, head_dim)), "conv": self.conv1d.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        z, xBC, dt = self._project(x)
        xBC, conv = self.conv1d(xBC, state["conv"], lengths)
        x, C, B, u, log_decay = self._selected(xBC, dt)
        o, S = outer_scan(C, B, u, log_decay, state["S"], lengths, chunk_size=self.config.chunk_size)
        return self._out(o, x, z), state.advance(x.shape[1] if lengths is None else lengths, S=S, conv=conv)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        z, xBC, dt = self._project(x)
        xBC, conv = self.conv1d(xBC, state["conv"])
        x, C, B, u, log_decay = self._selected(xBC, dt)
        o, S = outer_step(C, B, u, log_decay, state["S"])
        return self._out(o, x, z), state.advance(1, S=S, conv=conv)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """z, xBC and dt before its bias."""
        return self.in_proj(x).split([self.d_inner, sum(self.widths), self.n_heads], -1)

    def _selected(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x by heads, and what the rule takes: C, B, dt x and dt A; the last two in float32 at least."""
        x, B, C = xBC.split(self.widths, -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias)
        x = x.unflatten(-1, (self.n_heads, -1))
        return x, self._by_head(C), self._by_head(B), x * dt[..., None], -torch.exp(self.A_log.to(wide)) * dt

    def _by_head(self, x: Tensor) -> Float[Tensor, "B T H K"]:
        groups = x.unflatten(-1, (self.config.n_groups, 1, -1))
        return groups.expand(-1, -1, -1, self.n_heads // self.config.n_groups, -1).flatten(2, 3)

    def _out(self, o: Tensor, x: Tensor, z: Tensor) -> Tensor:
        gated = (o.to(x.dtype) + self.D[:, None] * x).flatten(2) * F.silu(z)
        normal = rms_norm(gated.unflatten(-1, (self.config.n_groups, -1)), self.norm.eps).flatten(2)
        return self.out_proj(normal * self.norm.weight)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        z, xBC, dt = self._project(x)
        x, C, B, u, log_decay = self._selected(self.conv1d.reference(xBC), dt)
        return self._out(outer_reference(C, B, u, log_decay)[0], x, z)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        head_dim = self.d_inner // self.n_heads
        return outer_flops(T, B, self.n_heads, self.config.d_state, head_dim, mode, "head", self.config.chunk_size)
