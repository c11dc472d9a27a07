r"""Forgetting Transformer (FoX): softmax attention whose logits fall with every forget gate between query and key.

    o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K) + sum_{i=s+1..t} log f_i) v_s        f_t = sigmoid(W_f x_t + b)

    pro:  k = norm(shift(W_k x))   v = shift(W_v x)   q = norm(W_q x)   y_t = W_o (norm(o_t) * sigmoid(W_g x_t))
          shift(u)_t = a_t u_{t-1} + (1 - a_t) u_t,  a_t = sigmoid(W_a x_t), a number a head

The gates tell near from far, so there are no positions. Without pro: q, k, v and o are the plain projections. Weights are
named as in fla (f_proj, g_proj), k_shift and v_shift being the authors' k_proj.shift_proj and v_proj.shift_proj.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_lines import add_grouped_lines, forget_bias, grouped_lines, log_forget
from slipstream.layers.linear import Linear
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.rms_norm import rms_norm
from slipstream.ops.valid import last_tokens


class ForgettingTransformer(Mixer, name="forgetting_transformer", family="attention"):
    paper = "Lin et al. 2025, arXiv:2503.02130"
    use_when = "attention is affordable, order matters, and texts will be longer than those trained on"
    writes, erases = "k and v, beside all others", "nothing"
    decays, reads = "a number a head, from x, before the softmax", "softmax(K q + sum log f)^T V"
    train_order, decode_order = "T^2", "T"
    symbols = {"Q": "q", "K": "k", "V": "v", "f": "exp(log_f)", "d": "head_dim"}
    oracle = "the parts of fla's ForgettingAttention around its naive operator, tests/oracles/delta_family.npz"
    no_weight_decay = ("q_norm", "k_norm", "o_norm")

    class Config(MixerConfig):
        n_heads: int | None = None  # query heads; default d_model / 64
        n_kv_heads: int | None = None  # key and value heads, each for a group of query heads; default n_heads
        pro: bool = True  # the paper's Pro block: shifted k and v, normalised q and k, normalised and gated output
        norm_eps: float = 1e-6  # of the norms of pro

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads, self.n_kv_heads, self.head_dim = add_grouped_lines(self, config.n_heads, config.n_kv_heads)
        self.f_proj = Linear(config.d_model, self.n_heads)
        nn.init.zeros_(self.f_proj.bias)
        if config.pro:
            self.k_shift = Linear(config.d_model, self.n_kv_heads, bias=False)
            self.v_shift = Linear(config.d_model, self.n_kv_heads, bias=False)
            self.q_norm, self.o_norm = (nn.Parameter(torch.ones(self.n_heads, self.head_dim)) for _ in range(2))
            self.k_norm = nn.Parameter(torch.ones(self.n_kv_heads, self.head_dim))
            self.g_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.n_kv_heads, self.head_dim), dtype=None, grows=True)
        last = Slot((1, self.n_kv_heads, self.head_dim), dtype=None)
        shifts = {"last_k": last, "last_v": last} if self.config.pro else {}
        return {"k": cache, "v": cache, "log_f": Slot((0, self.n_heads), grows=True), **shifts}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.step(x, self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """As prefill, in a cache that has room already: init_state(B, max_len), or reserve."""
        q, k, v, log_f = self._by_heads(x)
        shifts = {}
        if self.config.pro:
            (k, shifts["last_k"]), (v, shifts["last_v"]) = (
                self._shift(n, t, x, state[f"last_{n}"], lengths) for n, t in (("k", k), ("v", v))
            )
        q, k = self._normed(q, k)
        new = {"k": k, "v": v, "log_f": log_f}
        cache = {n: write_cache(state[n], t, state.length, lengths) for n, t in new.items()}
        bias = forget_bias(cache["log_f"])
        o = attention(q, cache["k"], cache["v"], state.length, lengths=lengths, key_bias=bias)
        return self._output(o, x), state.advance(x.shape[1] if lengths is None else lengths, **cache, **shifts)

    def _by_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "B T H"]]:
        return *grouped_lines(self, x, self.head_dim), log_forget(self.f_proj(x))

    def _shift(
        self, name: str, u: Float[Tensor, "B T G K"], x: Tensor, last: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Each token mixed with the one before, and the last token for the next call."""
        line = torch.cat([last.to(u.dtype), u], 1)
        rate = self.get_submodule(f"{name}_shift")(x).sigmoid()[..., None]
        return torch.lerp(u, line[:, :-1], rate), last_tokens(line, 1, lengths)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.pro:
            return q, k
        return rms_norm(q, eps=self.config.norm_eps) * self.q_norm, rms_norm(k, eps=self.config.norm_eps) * self.k_norm

    def _output(self, o: Float[Tensor, "B T H V"], x: Tensor) -> Float[Tensor, "B T D"]:
        if self.config.pro:
            o = (
                rms_norm(o, eps=self.config.norm_eps)
                * self.o_norm
                * self.g_proj(x).sigmoid().unflatten(-1, o.shape[2:])
            )
        return self.get_submodule("o_proj")(o.flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v, log_f = self._by_heads(x)
        if self.config.pro:
            a, b = self.k_shift(x).sigmoid()[..., None], self.v_shift(x).sigmoid()[..., None]
            before_k, before_v = (F.pad(t, (0, 0, 0, 0, 1, 0))[:, :-1] for t in (k, v))
            k, v = a * before_k + (1 - a) * k, b * before_v + (1 - b) * v
        return self._output(softmax_reference(*self._normed(q, k), v, key_bias=-log_f.cumsum(1)), x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return attention_flops(T, B, self.n_heads, self.head_dim, mode)
