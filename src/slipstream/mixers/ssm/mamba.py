r"""Mamba (S6): a diagonal state space whose step size, input and output matrices are chosen by every token.

    x, z = W_in u        x = silu(conv(x))        r_t, B_t, C_t = W_x x_t        dt_t = softplus(W_dt r_t + b_dt)
    h_t = exp(dt_t A) * h_{t-1} + dt_t B_t x_t    y_t = W_out ((C_t . h_t + D * x_t) * silu(z_t))

State space files keep the paper's letters: C is the query, B the key, x the value. A is real and negative (A =
-exp(A_log)). With negative_eigenvalues the decay is 2 exp(dt_t A) - 1, from -1 to 1: what parities need (Grazzi et al.).
With norms, r, B and C pass an RMS norm each (Jamba). Names and layout of the weights are those of transformers' MambaMixer and
JambaMambaMixer, and of the authors' code.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import PositiveFloat
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.mamba_block import block_reference, one_token, through_block
from slipstream.layers.norm import RMSNorm
from slipstream.layers.selection import add_selection, before_softplus, selected
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
    oracle = (
        "transformers MambaMixer, test_ssm_rnn_oracles.py, and with norms Jamba's and Falcon Mamba's, test_hybrid_oracles.py; with "
        "negative eigenvalues a numpy loop, state_space.npz"
    )
    no_weight_decay = ("A_log", "D", "bias")

    class Config(MixerConfig):
        expand: int = 2  # inner width / d_model
        d_state: int = 16  # numbers of state per inner channel
        conv_size: int = 4  # width of the short convolution
        dt_rank: int | None = None  # width through which the step size is made; default d_model / 16
        bias: bool = False  # biases on the projections in and out
        conv_bias: bool = True  # a bias on the short convolution
        norms: bool = False  # RMS norms on r, B and C (Jamba; Falcon Mamba has them with weights of one)
        norm_eps: PositiveFloat = 1e-6  # added under their roots
        negative_eigenvalues: bool = False  # decays from -1 to 1 instead of 0 to 1, so that parities can be tracked
        chunk_size: int = 16  # tokens expanded at a time; no result depends on it

    config: Config
    x_proj: Linear
    dt_proj: Linear
    A_log: nn.Parameter
    dt_layernorm: RMSNorm | None
    b_layernorm: RMSNorm | None
    c_layernorm: RMSNorm | None
    tiny = Config(d_model=16, d_state=4, conv_size=3, dt_rank=2, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.d_inner = config.expand * config.d_model
        self.in_proj = Linear(config.d_model, 2 * self.d_inner, bias=config.bias)
        self.conv1d = ShortConv(self.d_inner, config.conv_size, bias=config.conv_bias)
        norm_eps = config.norm_eps if config.norms else None
        add_selection(self, config.d_model, self.d_inner, config.d_state, config.dt_rank, norm_eps)
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = Linear(self.d_inner, config.d_model, bias=config.bias)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.d_inner, self.config.d_state)), "conv": self.conv1d.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        size, signed = self.config.chunk_size, self.config.negative_eigenvalues

        def recurrence(x: Tensor, D: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            return selective_scan(x, *before_softplus(self, x), state["h"], lengths, size, signed, True, D, z)

        return through_block(self, x, state, lengths, recurrence)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        def step(x: Float[Tensor, "B I"]) -> tuple[Tensor, Tensor]:
            return selective_step(x, *selected(self, x), state["h"], self.config.negative_eigenvalues)

        return through_block(self, x, state, None, one_token(step))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        start = x.new_zeros(x.shape[0], self.d_inner, self.config.d_state)
        signed = self.config.negative_eigenvalues
        return block_reference(self, x, lambda x: selective_reference(x, *selected(self, x), start, signed))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return selective_scan_flops(B if mode == "step" else B * T, self.d_inner, self.config.d_state)
