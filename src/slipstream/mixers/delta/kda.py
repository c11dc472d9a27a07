r"""Kimi Delta Attention (KDA): the delta rule with a forget gate for every key channel.

    S_t = (I - beta_t k_t k_t^T) D(alpha_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(K)

    alpha_t = exp(-exp(A) softplus(W_f2 W_f1 x_t + b))        beta_t = sigmoid(W_b x_t)
    q, k, v = silu(conv(W x))  with q, k of unit length        y_t = W_o (rmsnorm(o_t) * sigmoid(W_g2 W_g1 x_t))

Both gates are of rank head_dim. The layer of Kimi Linear, whose models put one full attention after three of these.
Weights are named as in Hugging Face's kimi_linear, whose one conv1d joins q_conv1d, k_conv1d and v_conv1d.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.decay_gate import NO_WEIGHT_DECAY, decay_rates, log_decay, time_steps
from slipstream.layers.delta_lines import delta_one, delta_prefill, unit_heads_reference
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots
from slipstream.layers.norm import RMSNorm
from slipstream.ops.delta_scan import delta_flops


class KimiDeltaAttention(Mixer, name="kda", family="delta"):
    paper = "Kimi Team 2025 (Kimi Linear), arXiv:2510.26692, eq. 1 and sec. 4"
    use_when = "as gated_deltanet, when channels should forget at rates of their own and slower training is affordable"
    writes, erases = "beta k v^T", "beta of what is stored under k"
    decays, reads = "a number a key channel, from x", "S^T q"
    train_order, decode_order = "T", "1"
    symbols = {"S": "S", "alpha": "exp(log_decay)", "beta": "beta", "A": "A_log", "b": "dt_bias"}
    oracle = "transformers KimiLinearDeltaAttention with copied weights, tests/oracles/test_delta_oracles.py"
    no_weight_decay = NO_WEIGHT_DECAY

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        head_dim: int | None = None  # width per head of q, k and v; default d_model / n_heads
        conv_size: int = 4  # width of the short convolution on q, k and v; 0 for none
        norm_eps: float = 1e-5  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, head_dim=6, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = config.n_heads or heads(config.d_model, None)
        self.head_dim = config.head_dim or config.d_model // heads(config.d_model, self.n_heads)
        width = self.n_heads * self.head_dim
        add_lines(self, dict.fromkeys("qkv", width), config.conv_size)
        self.f_a_proj = Linear(config.d_model, self.head_dim, bias=False)
        self.f_b_proj = Linear(self.head_dim, width, bias=False)
        self.A_log, self.dt_bias = decay_rates(self.n_heads), time_steps(width)
        self.b_proj = Linear(config.d_model, self.n_heads, bias=False)
        self.g_a_proj = Linear(config.d_model, self.head_dim, bias=False)
        self.g_b_proj = Linear(self.head_dim, width, bias=False)
        self.o_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.o_proj = Linear(width, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.head_dim, self.head_dim)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        o, state = delta_prefill(self, self.n_heads, self.config.chunk_size, x, *self._gates(x), state, lengths)
        return self._output(o, x), state

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        o, state = delta_one(self, self.n_heads, x, *self._gates(x), state)
        return self._output(o, x), state

    def _split(self, t: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H K"]:
        return t.unflatten(-1, (self.n_heads, self.head_dim))

    def _gates(self, x: Tensor) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H K"]]:
        """beta and log_decay."""
        forget = self._split(self.f_b_proj(self.f_a_proj(x)))
        dt_bias = self.dt_bias.unflatten(0, (self.n_heads, self.head_dim))
        return self.b_proj(x).sigmoid(), log_decay(forget, self.A_log[:, None], dt_bias)

    def _output(self, o: Float[Tensor, "B T H V"], x: Tensor) -> Float[Tensor, "B T D"]:
        gate = self._split(self.g_b_proj(self.g_a_proj(x))).sigmoid()
        return self.o_proj((self.o_norm(o) * gate).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = unit_heads_reference(self, x, self.n_heads, self.n_heads)
        beta, log_alpha = self._gates(x)
        S, outs, I = k.new_zeros(*k[:, 0].shape, self.head_dim), [], torch.eye(self.head_dim).to(x)
        for t in range(x.shape[1]):
            b = beta[:, t, :, None, None]
            kk, kv = (torch.einsum("bhi,bhj->bhij", k[:, t], a[:, t]) for a in (k, v))
            S = (I - b * kk) @ torch.diag_embed(log_alpha[:, t].exp()) @ S + b * kv
            outs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / self.head_dim**0.5)
        return self._output(torch.stack(outs, 1), x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return delta_flops(T, B, self.n_heads, self.head_dim, self.head_dim, mode, "channel", self.config.chunk_size)
