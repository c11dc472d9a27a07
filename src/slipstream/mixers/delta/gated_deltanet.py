r"""Gated DeltaNet: the delta rule with a forget gate per head.

    S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        o_t = S_t q_t / sqrt(K)

    alpha_t = exp(-exp(A) softplus(W_a x_t + b))        beta_t = sigmoid(W_b x_t)
    q, k, v = silu(conv(W x))  with q, k of unit length        y_t = W_o (rmsnorm(o_t) * silu(W_g x_t))

The layer of Qwen3-Next, where n_v_heads value heads share fewer query and key heads. Weights are named as in fla
(q_proj, q_conv1d, a_proj, b_proj, g_proj, o_norm); Qwen3-Next stores the same rows joined and interleaved.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.decay_gate import NO_WEIGHT_DECAY, decay_rates, log_decay, time_steps
from slipstream.layers.delta_lines import delta_one, delta_prefill, unit_heads_reference
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots
from slipstream.layers.norm import GatedRMSNorm
from slipstream.ops.delta_scan import delta_flops


class GatedDeltaNet(Mixer, name="gated_deltanet", family="delta"):
    paper = "Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464, eq. 10"
    use_when = "constant memory with good recall for its size: old content is forgotten at will, or overwritten exactly"
    writes, erases = "beta v k^T", "beta of what is stored under k"
    decays, reads = "a number a head, from x", "S q"
    train_order, decode_order = "T", "1"
    symbols = {"S": "S transposed", "alpha": "exp(log_decay)", "beta": "beta", "A": "A_log", "b": "dt_bias"}
    oracle = "transformers Qwen3NextGatedDeltaNet with copied weights, tests/oracles/test_delta_oracles.py"
    no_weight_decay = NO_WEIGHT_DECAY

    class Config(MixerConfig):
        n_heads: int | None = None  # query and key heads; default d_model / 64
        n_v_heads: int | None = None  # value heads that share queries and keys, a multiple of n_heads; default n_heads
        head_dim: int | None = None  # query and key width per head; default d_model / n_heads
        expand_v: float = 1.0  # value width per head as a multiple of head_dim
        conv_size: int = 4  # width of the short convolution on q, k and v; 0 for none
        negative_eigenvalues: bool = False  # beta in (0, 2), which tracks states: arXiv:2411.12537
        norm_eps: float = 1e-6  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, n_v_heads=4, head_dim=4, expand_v=1.5, negative_eigenvalues=True, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = config.n_heads or heads(config.d_model, None)
        self.n_v_heads = config.n_v_heads or self.n_heads
        self.head_dim = config.head_dim or config.d_model // heads(config.d_model, self.n_heads)
        self.v_head_dim = round(self.head_dim * config.expand_v)
        if self.n_v_heads % self.n_heads:
            raise InputError(f"n_v_heads {self.n_v_heads} is no multiple of n_heads {self.n_heads}; {self.n_heads} is")
        k_width, v_width = self.n_heads * self.head_dim, self.n_v_heads * self.v_head_dim
        add_lines(self, {"q": k_width, "k": k_width, "v": v_width}, config.conv_size)
        self.a_proj = Linear(config.d_model, self.n_v_heads, bias=False)
        self.b_proj = Linear(config.d_model, self.n_v_heads, bias=False)
        self.g_proj = Linear(config.d_model, v_width, bias=False)
        self.A_log, self.dt_bias = decay_rates(self.n_v_heads), time_steps(self.n_v_heads)
        self.o_norm = GatedRMSNorm(self.v_head_dim, config.norm_eps)
        self.o_proj = Linear(v_width, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_v_heads, self.head_dim, self.v_head_dim)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        o, state = delta_prefill(self, self.n_heads, self.config.chunk_size, x, *self._gates(x), state, lengths)
        return self._output(o, x), state

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        o, state = delta_one(self, self.n_heads, x, *self._gates(x), state)
        return self._output(o, x), state

    def _gates(self, x: Tensor) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
        """beta and log_decay."""
        beta = self.b_proj(x).sigmoid() * (2 if self.config.negative_eigenvalues else 1)
        return beta, log_decay(self.a_proj(x), self.A_log, self.dt_bias)

    def _output(self, o: Float[Tensor, "B T H V"], x: Tensor) -> Float[Tensor, "B T D"]:
        return self.o_proj(self.o_norm(o, self.g_proj(x).unflatten(-1, o.shape[2:])).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = unit_heads_reference(self, x, self.n_heads, self.n_v_heads)
        beta, log_alpha = (t[..., None, None] for t in self._gates(x))
        S, outs = x.new_zeros(x.shape[0], *v.shape[2:], self.head_dim), []  # (B H V K): the paper's S
        I = torch.eye(self.head_dim).to(x)
        for t in range(x.shape[1]):
            kk, vk = (torch.einsum("bhi,bhj->bhij", a[:, t], k[:, t]) for a in (k, v))
            S = log_alpha[:, t].exp() * S @ (I - beta[:, t] * kk) + beta[:, t] * vk
            outs.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]) / self.head_dim**0.5)
        return self._output(torch.stack(outs, 1), x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return delta_flops(T, B, self.n_v_heads, self.head_dim, self.v_head_dim, mode, "head", self.config.chunk_size)
