r"""Longhorn: a state space that solves a small regression at every token, in closed form.

    x, z = W_in u        x = silu(conv(x))        r_t, k_t, q_t = W_x x_t        beta_t = sigmoid(W_dt r_t + b_dt)
    eps_t = beta_t / (1 + beta_t |k_t|^2)
    h_t = (1 - eps_t (k_t * k_t)^T) * h_{t-1} + (eps_t * x_t) k_t^T        y_t = W_out ((h_t q_t + D * x_t) * silu(z_t))

h_t is near h_{t-1} and answers k_t with x_t; beta says which matters more. The diagonal of k k^T stands for the whole,
which keeps channels and states apart, as in Mamba; and there is no A: what is written decides what is forgotten.
Weights are named and laid out as in the authors' code.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.mamba_block import block_reference, one_token, through_block
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.selective_scan import selective_scan, selective_scan_flops, selective_step


class Longhorn(Mixer, name="longhorn", family="ssm"):
    paper = "Liu et al. 2024, arXiv:2407.14207; block and weights: the authors' code (Cranial-XIX/longhorn)"
    use_when = "where Mamba would be used, with a memory that overwrites what it is told again and has no decay to tune"
    writes, erases = "(eps x) k^T", "eps (k * k), channel by channel of the key"
    decays, reads = "nothing", "h q"
    symbols = {"S": "h", "Δ, ε": "eps", "β": "beta", "d": "expand * d_model", "m": "d_state"}
    oracle = "numpy loop by the authors' step, tests/oracles/make_state_space.py, state_space.npz"
    no_weight_decay = ("D", "bias")

    class Config(MixerConfig):
        expand: int = 2  # inner width / d_model
        d_state: int = 16  # numbers of state per inner channel: the width of k and q
        conv_size: int = 4  # width of the short convolution
        dt_rank: int | None = None  # width through which beta is made; default d_model / 16
        chunk_size: int = 16  # tokens expanded at a time; no result depends on it

    config: Config
    tiny = Config(d_model=16, d_state=4, conv_size=3, dt_rank=2, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d_inner, self.dt_rank = config.expand * config.d_model, config.dt_rank or math.ceil(config.d_model / 16)
        self.in_proj = Linear(config.d_model, 2 * d_inner, bias=False)
        self.conv1d = ShortConv(d_inner, config.conv_size, bias=True)
        self.x_proj = Linear(d_inner, self.dt_rank + 2 * config.d_state, bias=False)
        self.dt_head = Linear(self.dt_rank, d_inner)
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = Linear(d_inner, config.d_model, bias=False)
        nn.init.zeros_(self.dt_head.bias)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((len(self.D), self.config.d_state)), "conv": self.conv1d.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        size = self.config.chunk_size

        def recurrence(x: Tensor, D: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            eps, k, q = self._selected(x)
            return selective_scan(x, eps, None, k, q, state["h"], lengths, size, D=D, gate=z)

        return through_block(self, x, state, lengths, recurrence)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        def step(x: Float[Tensor, "B I"]) -> tuple[Tensor, Tensor]:
            eps, k, q = self._selected(x)
            return selective_step(x, eps, None, k, q, state["h"])

        return through_block(self, x, state, None, one_token(step))

    def _selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """eps in float32 at least, k and q."""
        r, k, q = self.x_proj(x).split([self.dt_rank, self.config.d_state, self.config.d_state], -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        beta = self.dt_head(r).to(wide).sigmoid()
        return beta / (1 + beta * k.to(wide).square().sum(-1, keepdim=True)), k, q

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return block_reference(self, x, self._token_by_token)

    def _token_by_token(self, x: Tensor) -> tuple[Tensor, Tensor]:
        eps, k, q = self._selected(x)
        h, outs = x.new_zeros(*x.shape[::2], self.config.d_state), []
        for t in range(x.shape[1]):
            erase, write = eps[:, t, :, None] * k[:, t, None] ** 2, (eps * x)[:, t, :, None] * k[:, t, None]
            h = h - erase * h + write
            outs.append(torch.einsum("bdn,bn->bd", h, q[:, t]))
        return torch.stack(outs, 1), h

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return selective_scan_flops(B if mode == "step" else B * T, len(self.D), self.config.d_state)
