r"""Mamba-2 (SSD): a selective state space with one decay per head, which makes it linear attention with a gate.

    z, xBC, dt = W_in u        x, B, C = silu(conv(xBC))        dt_t = softplus(dt_t + dt_bias)
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T                o_t = S_t^T C_t + D x_t
    y_t = W_out (rms_norm(o_t * silu(z_t)) * weight)

State space files keep the paper's letters: C is the query, B the key, x the value. B and C are shared by the heads of a
group, and the norm is over the channels of a group. Weights are named and laid out as those of transformers'
Mamba2Mixer.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.layers.short_conv import ShortConv
from slipstream.layers.ssd_block import NO_WEIGHT_DECAY, SSDConfig, add_block, output, projected, selected
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step
from slipstream.ops.outer_scan import reference as outer_reference


class Mamba2(Mixer, name="mamba2", family="ssm"):
    paper = "Dao & Gu 2024, arXiv:2405.21060, eq. 1 with scalar A, section 7, figure 6; norm by groups: authors' code"
    use_when = "long streams with constant memory and a state several times larger than Mamba's at the same speed"
    writes, erases = "B (dt x)^T", "nothing"
    decays, reads = "a number a head, from x", "S^T C"
    symbols = {"C": "q", "B": "k", "X": "x", "Δ": "dt", "P": "head_dim", "N": "d_state", "a": "exp(dt A)"}
    oracle = "transformers Mamba2Mixer, tests/oracles/test_ssm_rnn_oracles.py"
    no_weight_decay = NO_WEIGHT_DECAY

    class Config(SSDConfig):
        pass

    config: Config
    in_proj: Linear
    conv1d: ShortConv
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter
    norm: RMSNorm
    out_proj: Linear
    tiny = Config(d_model=16, n_heads=4, n_groups=2, d_state=6, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads, self.head_dim = add_block(self, config)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.config.d_state, self.head_dim)), "conv": self.conv1d.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        z, xBC, dt, _ = projected(self, self.config, x)
        xBC, conv = self.conv1d(xBC, state["conv"], lengths)
        u, rule = selected(self, self.config, xBC, dt)
        o, S = outer_scan(*rule, state["S"], lengths, chunk_size=self.config.chunk_size)
        state = state.advance(x.shape[1] if lengths is None else lengths, S=S, conv=conv)
        return output(self, self.config, o, u, z), state

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        z, xBC, dt, _ = projected(self, self.config, x)
        xBC, conv = self.conv1d(xBC, state["conv"])
        u, rule = selected(self, self.config, xBC, dt)
        o, S = outer_step(*rule, state["S"])
        return output(self, self.config, o, u, z), state.advance(1, S=S, conv=conv)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        z, xBC, dt, _ = projected(self, self.config, x)
        u, rule = selected(self, self.config, self.conv1d.reference(xBC), dt)
        return output(self, self.config, outer_reference(*rule)[0], u, z)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return outer_flops(T, B, self.n_heads, self.config.d_state, self.head_dim, mode, "head", self.config.chunk_size)
