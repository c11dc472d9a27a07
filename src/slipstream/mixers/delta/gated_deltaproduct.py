r"""Gated DeltaProduct: the gated delta rule with several writes a token, each with a key and a value of its own.

    S_{t,0} = alpha_t S_{t-1,n}        S_{t,j} = S_{t,j-1} (I - beta_j k_j k_j^T) + beta_j v_j k_j^T  for j = 1..n
    o_t = S_{t,n} q_t / sqrt(K)

    alpha_t = exp(-exp(A) softplus(W_a x_t + b))        beta_j = 2 sigmoid(W_bj x_t)
    q, k_j, v_j = silu(conv(W x))  with q, k_j of unit length        y_t = W_o (rmsnorm(o_t) * silu(W_g x_t))

A product of n reflections is any orthogonal map of n dimensions: with more of them a layer tracks larger groups of states.
Time grows as n, memory does not. Weights are named and laid out as in fla (writes outside, heads inside).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.decay_gate import NO_WEIGHT_DECAY, decay_rates, log_decay, time_steps
from slipstream.layers.delta_lines import unit_heads
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots, lines_reference, run_lines
from slipstream.layers.norm import GatedRMSNorm
from slipstream.ops.chunks import DecayKind
from slipstream.ops.delta_scan import delta_flops, delta_scan, delta_step


class GatedDeltaProduct(Mixer, name="gated_deltaproduct", family="delta"):
    paper = "Siems et al. 2025 (DeltaProduct), arXiv:2502.10297"
    use_when = "states must be tracked that one reflection a token cannot follow, and n times the work is affordable"
    writes, erases = "n times beta_j v_j k_j^T", "beta_j of what is stored under each k_j"
    decays, reads = "a number a head, from x", "S q"
    train_order, decode_order = "T", "1"
    symbols = {"S": "S transposed", "alpha": "exp(log_decay)", "beta": "beta", "n_h": "n_householder"}
    oracle = (
        "naive_recurrent_gated_delta_product of fla 0.6.0 between its layer's parts, tests/oracles/delta_family.npz"
    )
    no_weight_decay = NO_WEIGHT_DECAY

    class Config(MixerConfig):
        n_householder: int = 2  # writes a token, n
        n_heads: int | None = None  # query and key heads; default d_model / 64
        n_v_heads: int | None = None  # value heads that share queries and keys, a multiple of n_heads; default n_heads
        head_dim: int | None = None  # query and key width per head; default d_model / n_heads
        expand_v: float = 1.0  # value width per head as a multiple of head_dim
        conv_size: int = 4  # width of the short convolution on q, k and v; 0 for none
        forget_gate: bool = True  # False: alpha is 1, plain DeltaProduct
        negative_eigenvalues: bool = True  # beta in (0, 2), so that a write may reflect; False: in (0, 1)
        norm_eps: float = 1e-5  # of the output norm
        chunk_size: int = 64  # writes computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_householder=3, n_heads=1, n_v_heads=2, head_dim=4, expand_v=1.5, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n, self.n_heads = config.n_householder, config.n_heads or heads(config.d_model, None)
        self.n_v_heads = config.n_v_heads or self.n_heads
        self.head_dim = config.head_dim or config.d_model // heads(config.d_model, self.n_heads)
        self.v_head_dim = round(self.head_dim * config.expand_v)
        if self.n < 1:
            raise InputError(f"n_householder {self.n}: a token writes at least once")
        if self.n_v_heads % self.n_heads:
            raise InputError(f"n_v_heads {self.n_v_heads} is no multiple of n_heads {self.n_heads}; {self.n_heads} is")
        k_width, v_width = self.n_heads * self.head_dim, self.n_v_heads * self.v_head_dim
        add_lines(self, {"q": k_width, "k": self.n * k_width, "v": self.n * v_width}, config.conv_size)
        self.b_proj = Linear(config.d_model, self.n * self.n_v_heads, bias=False)
        if config.forget_gate:
            self.a_proj = Linear(config.d_model, self.n_v_heads, bias=False)
            self.A_log, self.dt_bias = decay_rates(self.n_v_heads), time_steps(self.n_v_heads)
        self.g_proj = Linear(config.d_model, v_width, bias=False)
        self.o_norm = GatedRMSNorm(self.v_head_dim, config.norm_eps)
        self.o_proj = Linear(v_width, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_v_heads, self.head_dim, self.v_head_dim)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """The delta rule over T n writes; only a token's last one is read."""
        lines, convs = run_lines(self, "qkv", x, state, lengths)
        (q, k, v), (beta, log_alpha) = self._by_heads(lines), self._gates(x)
        last = F.pad(q[:, :, None], (0, 0, 0, 0, self.n - 1, 0)).flatten(1, 2)
        first = None if log_alpha is None else F.pad(log_alpha[:, :, None], (0, 0, 0, self.n - 1)).flatten(1, 2)
        writes, scale = None if lengths is None else lengths * self.n, self.head_dim**-0.5
        o, S = delta_scan(last, k, v, beta, first, state["S"], writes, scale, self.config.chunk_size)
        tokens = x.shape[1] if lengths is None else lengths
        return self._output(o[:, self.n - 1 :: self.n], x), state.advance(tokens, S=S, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qkv", x, state, None)
        (q, k, v), (beta, log_alpha), S = self._by_heads(lines), self._gates(x), state["S"]
        for one in zip(k.split(1, 1), v.split(1, 1), beta.split(1, 1)):
            o, S = delta_step(q, *one, log_alpha, S, self.head_dim**-0.5)
            log_alpha = None
        return self._output(o, x), state.advance(1, S=S, **convs)

    def _by_heads(self, lines: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q (B T H K), k (B Tn H K), v (B Tn H V)."""
        lines |= {name: self._apart(lines[name]) for name in "kv"}
        return unit_heads(self, lines, self.n_heads, self.n_v_heads)

    def _apart(self, t: Float[Tensor, "B T nD"]) -> Float[Tensor, "B Tn D"]:
        return t.unflatten(-1, (self.n, -1)).flatten(1, 2)

    def _gates(self, x: Tensor) -> tuple[Float[Tensor, "B Tn H"], Float[Tensor, "B T H"] | None]:
        """beta of every write, and a token's log_decay."""
        beta = self._apart(self.b_proj(x)).sigmoid() * (2 if self.config.negative_eigenvalues else 1)
        return beta, log_decay(self.a_proj(x), self.A_log, self.dt_bias) if self.config.forget_gate else None

    def _output(self, o: Float[Tensor, "B T H V"], x: Tensor) -> Float[Tensor, "B T D"]:
        return self.o_proj(self.o_norm(o, self.g_proj(x).unflatten(-1, o.shape[2:])).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        (q, k, v), (beta, log_alpha) = self._by_heads(lines_reference(self, "qkv", x)), self._gates(x)
        S, outs = x.new_zeros(*v[:, 0].shape, self.head_dim), []  # (B H V K): the paper's S
        for t in range(x.shape[1]):
            S = S if log_alpha is None else log_alpha[:, t, :, None, None].exp() * S
            for j in range(t * self.n, t * self.n + self.n):
                kk, vk = (torch.einsum("bhi,bhj->bhij", a[:, j], k[:, j]) for a in (k, v))
                b = beta[:, j, :, None, None]
                S = S @ (torch.eye(self.head_dim).to(x) - b * kk) + b * vk
            outs.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]) / self.head_dim**0.5)
        return self._output(torch.stack(outs, 1), x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        sizes = self.n_v_heads, self.head_dim, self.v_head_dim
        kind: DecayKind = "head" if self.config.forget_gate else "none"
        if mode == "step":
            return self.n * delta_flops(1, B, *sizes, mode)
        return delta_flops(T * self.n, B, *sizes, mode, kind, self.config.chunk_size)
