r"""Mamba-2 (SSD): a selective state space with one decay per head, which makes it linear attention with a gate.

    z, xBC, dt = W_in u        x, B, C = silu(conv(xBC))        dt_t = softplus(dt_t + dt_bias)
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T                o_t = S_t^T C_t + D x_t
    y_t = W_out (rms_norm(o_t * silu(z_t)) * weight)

State space files keep the paper's letters: C is the query, B the key, x the value. B and C are shared by the heads of a
group, and the norm is over the channels of a group. Settings make it what Bamba, Granite 4, Nemotron-H, Zamba2 and Falcon-H1
have of it. Weights are named and laid out as those of transformers' Mamba2Mixer.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.layers.short_conv import ShortConv
from slipstream.layers.ssd_block import (
    NO_WEIGHT_DECAY,
    SSDConfig,
    add_block,
    projected,
    ssd,
    ssd_flops,
    ssd_one,
    ssd_reference,
    ssd_slots,
)


class Mamba2(Mixer, name="mamba2", family="ssm"):
    paper = "Dao & Gu 2024, arXiv:2405.21060, eq. 1 with scalar A, section 7, figure 6; norm by groups: authors' code"
    use_when = "long streams with constant memory and a state several times larger than Mamba's at the same speed"
    writes, erases = "B (dt x)^T", "nothing"
    decays, reads = "a number a head, from x", "S^T C"
    symbols = {"C": "q", "B": "k", "X": "x", "Δ": "dt", "P": "head_dim", "N": "d_state", "a": "exp(dt A)"}
    oracle = (
        "transformers Mamba2Mixer, tests/oracles/test_ssm_rnn_oracles.py; its settings against Bamba, Nemotron-H, Zamba2 and "
        "Falcon-H1, test_hybrid_oracles.py"
    )
    no_weight_decay = NO_WEIGHT_DECAY

    class Config(SSDConfig):
        pass

    config: Config
    in_proj: Linear
    conv1d: ShortConv
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter
    norm: RMSNorm | None
    out_proj: Linear
    tiny = Config(d_model=16, n_heads=4, n_groups=2, d_state=6, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads, self.head_dim = add_block(self, config)

    def slots(self) -> dict[str, Slot]:
        return ssd_slots(self, self.config)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines = projected(self, self.config, x)
        y, kept = ssd(self, self.config, lines, state["S"], state["conv"], lengths)
        return y, state.advance(x.shape[1] if lengths is None else lengths, **kept)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        y, kept = ssd_one(self, self.config, projected(self, self.config, x), state["S"], state["conv"])
        return y, state.advance(1, **kept)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return ssd_reference(self, self.config, projected(self, self.config, x))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return ssd_flops(self.config, self.n_heads, T, B, mode)
