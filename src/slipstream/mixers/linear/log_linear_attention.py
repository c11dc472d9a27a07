r"""Log-linear attention: Mamba-2 whose memory is a state for every scale of the past, 1, 2, 4, ... tokens back.

    S^l_t = sum over the tokens s of block l of exp(sum_{r=s+1}^t dt_r A) B_s (dt_s x_s)^T
    o_t = sum_l lambda^l_t (S^l_t)^T C_t + D x_t        lambda^l_t = softplus(L^l * dl^l_t)

    z, xBC, dt, dl = W_in u        x, B, C = silu(conv(xBC))        dt_t = softplus(dt_t + dt_bias)        A = -exp(A_log)
    y_t = W_out (rms_norm(o_t * silu(z_t)) * weight)

Block 0 is the token itself; the blocks before it are those of a Fenwick tree, which holds log2 t of them: what is near is
told apart, what is far is summed up. The last of n_levels takes everything older than 2^(n_levels - 2) tokens, so memory is
bounded, and a step, which reads all levels, costs the same at any length. Weights are laid out as in fla's
LogLinearMamba2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.layers.short_conv import ShortConv
from slipstream.layers.ssd_block import NO_WEIGHT_DECAY, SSDConfig, add_block, output, projected, selected
from slipstream.ops.log_linear_scan import log_linear_flops, log_linear_scan, log_linear_step
from slipstream.ops.log_linear_scan import reference as log_linear_reference


class LogLinearAttention(Mixer, name="log_linear_attention", family="linear"):
    paper = "Guo, Yang, Goel, Xing, Dao, Kim 2025, arXiv:2506.04761, sec. 3; layer as in fla 0.6.0"
    use_when = "Mamba-2 recalls too little: a dozen states instead of one, near tokens told apart, far ones summed up"
    train_order, decode_order = "T log T", "1"
    writes, erases = "B (dt x)^T, to the lowest empty level", "nothing"
    decays, reads = "a number a head, from x", "sum_l lambda^l (S^l)^T C"
    symbols = {"S^l": "S[l - 1]", "lambda": "level_scale", "C, B, X": "q, k, v", "L": "level_weight"}
    oracle = "naive_log_linear_attn of fla 0.6.0 inside its layer, tests/oracles/slot_attention.npz"
    no_weight_decay = (*NO_WEIGHT_DECAY, "level_weight")

    class Config(SSDConfig):
        n_levels: int = 15  # scales told apart: the token, blocks of 1, 2, 4, ... before it, and all that is older

    config: Config
    in_proj: Linear
    conv1d: ShortConv
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter
    norm: RMSNorm | None
    out_proj: Linear
    tiny = Config(d_model=16, n_heads=4, n_groups=2, d_state=8, conv_size=3, chunk_size=4, n_levels=24)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.n_levels < 2:
            raise InputError(f"n_levels {config.n_levels} must be at least 2: the token itself, and all before it")
        self.n_heads, self.head_dim = add_block(self, config, more=config.n_levels)
        self.level_weight = nn.Parameter(torch.ones(self.n_heads, config.n_levels))

    def slots(self) -> dict[str, Slot]:
        S = Slot((self.config.n_levels - 1, self.n_heads, self.config.d_state, self.head_dim))
        return {"S": S, "conv": self.conv1d.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        z, xBC, dt, dl = projected(self, self.config, x)
        xBC, conv = self.conv1d(xBC, state["conv"], lengths)
        u, rule = selected(self, self.config, xBC, dt)
        memory, chunk_size = (state["S"], state.length), self.config.chunk_size
        o, (S, _) = log_linear_scan(*rule, self._level_scale(dl), memory, lengths, chunk_size=chunk_size)
        state = state.advance(x.shape[1] if lengths is None else lengths, S=S, conv=conv)
        return output(self, self.config, o, u, z), state

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        z, xBC, dt, dl = projected(self, self.config, x)
        xBC, conv = self.conv1d(xBC, state["conv"])
        u, rule = selected(self, self.config, xBC, dt)
        o, (S, _) = log_linear_step(*rule, self._level_scale(dl), (state["S"], state.length))
        return output(self, self.config, o, u, z), state.advance(1, S=S, conv=conv)

    def _level_scale(self, dl: Float[Tensor, "B T HL"]) -> Float[Tensor, "B T H L"]:
        return F.softplus(self.level_weight * dl.unflatten(-1, (self.n_heads, -1)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        z, xBC, dt, dl = projected(self, self.config, x)
        u, rule = selected(self, self.config, self.conv1d.reference(xBC), dt)
        return output(self, self.config, log_linear_reference(*rule, self._level_scale(dl))[0], u, z)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K, c = self.config.d_state, self.config
        return log_linear_flops(T, B, self.n_heads, K, self.head_dim, c.n_levels, mode, c.chunk_size)
