r"""Comba: the gated delta rule as a closed loop, with a weakened erase and a corrected read.

    S_t = alpha_t S_{t-1} (I - beta_t p_t k_t^T) + beta_t v_t k_t^T        p_t = c k_t        o_t = S_t q_t / sqrt(K)

    alpha_t = exp(-exp(A) softplus(W_a x_t + b))        beta_t = sigmoid(W_b x_t)        c = sigmoid(C), a number a head
    k = unit(k'),  q = unit(q' - D c k'),  q', k', v = silu(conv(W x))      y_t = W_o (rmsnorm(o_t) * sigmoid(W_g x_t))

D, a number a head, takes from the query what its own token has just written. Its start, `correction`, is 0.02 as the
authors advise for small models; they give 1 for large ones. Their kernel also brings p to unit length, which undoes c
in the erase: here, as in the paper, it acts. Weights are named as in fla (C is `decay`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.decay_gate import NO_WEIGHT_DECAY, decay_rates, log_decay, time_steps
from slipstream.layers.delta_lines import by_heads, unit
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots, lines_reference, run_lines
from slipstream.layers.norm import RMSNorm
from slipstream.ops.delta_scan import delta_flops, delta_scan, delta_step


class Comba(Mixer, name="comba", family="delta"):
    paper = "Hu et al. 2025, arXiv:2506.02475"
    use_when = "as gated_deltanet, when a head should be free to erase less than it writes"
    writes, erases = "beta v k^T", "c beta of what is stored under k"
    decays, reads = "a number a head, from x", "S q, with q less d k"
    train_order, decode_order = "T", "1"
    symbols = {"S": "S transposed", "alpha": "exp(log_decay)", "beta": "beta", "c": "sigmoid(decay)", "d": "D"}
    oracle = "naive_recurrent_comba of fla 0.6.0 between fla's convolutions and norms, tests/oracles/delta_family.npz"
    no_weight_decay = (*NO_WEIGHT_DECAY, "decay", "D")

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        head_dim: int | None = None  # query and key width per head; default d_model / n_heads
        expand_v: float = 1.0  # value width per head as a multiple of head_dim
        conv_size: int = 4  # width of the short convolution on q, k and v; 0 for none
        correction: float = 0.02  # start of D, how much of its own key a query gives up; 1 for large models
        norm_eps: float = 1e-5  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, head_dim=4, expand_v=1.5, correction=0.3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = config.n_heads or heads(config.d_model, None)
        self.head_dim = config.head_dim or config.d_model // heads(config.d_model, self.n_heads)
        self.v_head_dim = round(self.head_dim * config.expand_v)
        k_width, v_width = self.n_heads * self.head_dim, self.n_heads * self.v_head_dim
        add_lines(self, {"q": k_width, "k": k_width, "v": v_width}, config.conv_size)
        self.a_proj = Linear(config.d_model, self.n_heads, bias=False)
        self.b_proj = Linear(config.d_model, self.n_heads, bias=False)
        self.g_proj = Linear(config.d_model, v_width, bias=False)
        self.A_log, self.dt_bias = decay_rates(self.n_heads), time_steps(self.n_heads)
        self.decay = nn.Parameter(torch.ones(self.n_heads))
        self.D = nn.Parameter(torch.full((self.n_heads,), config.correction))
        self.o_norm = RMSNorm(self.v_head_dim, config.norm_eps)
        self.o_proj = Linear(v_width, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.head_dim, self.v_head_dim)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines, convs = run_lines(self, "qkv", x, state, lengths)
        scale, chunk_size = self.head_dim**-0.5, self.config.chunk_size
        o, S = delta_scan(*self._as_delta_rule(lines, x), state["S"], lengths, scale, chunk_size)
        return self._output(o, x), state.advance(x.shape[1] if lengths is None else lengths, S=S, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qkv", x, state, None)
        o, S = delta_step(*self._as_delta_rule(lines, x), state["S"], self.head_dim**-0.5)
        return self._output(o, x), state.advance(1, S=S, **convs)

    def _as_delta_rule(self, lines: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """beta (v - c k^T S) is what the plain rule writes at strength c beta for the value v / c."""
        (q, k, v), (beta, log_alpha), c = self._by_heads(lines), self._gates(x), self.decay.sigmoid()
        return q, k, v / c[:, None], beta * c, log_alpha

    def _by_heads(self, lines: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = by_heads(self, lines, self.n_heads, self.n_heads)
        own = (self.D * self.decay.sigmoid())[:, None] * k
        return unit(q - own, self.n_heads), unit(k, self.n_heads), v

    def _gates(self, x: Tensor) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
        """beta and log_decay."""
        return self.b_proj(x).sigmoid(), log_decay(self.a_proj(x), self.A_log, self.dt_bias)

    def _output(self, o: Float[Tensor, "B T H V"], x: Tensor) -> Float[Tensor, "B T D"]:
        gate = self.g_proj(x).sigmoid().unflatten(-1, o.shape[2:])
        return self.o_proj((self.o_norm(o) * gate).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self._by_heads(lines_reference(self, "qkv", x))
        p, (beta, log_alpha) = self.decay.sigmoid()[:, None] * k, (t[..., None, None] for t in self._gates(x))
        S, outs = x.new_zeros(*v[:, 0].shape, self.head_dim), []  # (B H V K): the paper's S
        for t in range(x.shape[1]):
            pk, vk = (torch.einsum("bhi,bhj->bhij", a[:, t], k[:, t]) for a in (p, v))
            S = log_alpha[:, t].exp() * S @ (torch.eye(self.head_dim).to(x) - beta[:, t] * pk) + beta[:, t] * vk
            outs.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]) / self.head_dim**0.5)
        return self._output(torch.stack(outs, 1), x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return delta_flops(T, B, self.n_heads, self.head_dim, self.v_head_dim, mode, "head", self.config.chunk_size)
