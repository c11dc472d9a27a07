r"""DeltaNet: linear attention whose every write first erases what its key held.

    S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        o_t = S_t q_t / sqrt(K)

    beta_t = sigmoid(W_b x_t)        q, k, v = silu(conv(W x))  with q, k of unit length        y_t = W_o rmsnorm(o_t)

A fast-weight memory trained by one gradient step a token on |S k_t - v_t|^2. It never forgets but by overwriting.
Weights are named as in fla (q_proj, q_conv1d, b_proj, o_norm, o_proj).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.delta_lines import delta_one, delta_prefill, unit_heads_reference
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots
from slipstream.layers.norm import RMSNorm
from slipstream.ops.delta_scan import delta_flops


class DeltaNet(Mixer, name="deltanet", family="delta"):
    paper = "Schlag, Irie, Schmidhuber 2021, arXiv:2102.11174; Yang et al. 2024, arXiv:2406.06484, sec. 2.2"
    use_when = "recall by key in constant memory matters more than forgetting, or states must be tracked"
    writes, erases = "beta v k^T", "beta of what is stored under k"
    decays, reads = "nothing", "S q"
    train_order, decode_order = "T", "1"
    symbols = {"W": "S transposed", "S": "S transposed", "beta": "beta"}
    oracle = "gradient steps in numpy, tests/oracles/linear_attention.npz; its op: delta_rule_recurrence of fla 0.6.0, fla_ops.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        conv_size: int = 4  # width of the short convolution on q, k and v; 0 for none
        negative_eigenvalues: bool = False  # beta in (0, 2), which tracks states: arXiv:2411.12537
        norm_eps: float = 1e-5  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, negative_eigenvalues=True, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.head_dim = config.d_model // self.n_heads
        add_lines(self, dict.fromkeys("qkv", config.d_model), config.conv_size)
        self.b_proj = Linear(config.d_model, self.n_heads, bias=False)
        self.o_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.head_dim, self.head_dim)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        o, state = delta_prefill(self, self.n_heads, self.config.chunk_size, x, self._beta(x), None, state, lengths)
        return self._output(o), state

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        o, state = delta_one(self, self.n_heads, x, self._beta(x), None, state)
        return self._output(o), state

    def _beta(self, x: Tensor) -> Float[Tensor, "B T H"]:
        return self.b_proj(x).sigmoid() * (2 if self.config.negative_eigenvalues else 1)

    def _output(self, o: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(self.o_norm(o).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = unit_heads_reference(self, x, self.n_heads, self.n_heads)
        beta, I = self._beta(x)[..., None, None], torch.eye(self.head_dim).to(x)
        S, outs = x.new_zeros(x.shape[0], self.n_heads, self.head_dim, self.head_dim), []  # (B H V K): the paper's S
        for t in range(x.shape[1]):
            kk, vk = (torch.einsum("bhi,bhj->bhij", a[:, t], k[:, t]) for a in (k, v))
            S = S @ (I - beta[:, t] * kk) + beta[:, t] * vk
            outs.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]) / self.head_dim**0.5)
        return self._output(torch.stack(outs, 1))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return delta_flops(T, B, self.n_heads, self.head_dim, self.head_dim, mode, "none", self.config.chunk_size)
