r"""Tensor product attention (TPA): queries, keys and values are each a mean of a few products of a head and a channel factor.

    q_t^h = 1/Q sum_r a_t^{hr} rope(b_t^r)      a_t = W_aq x_t  (H Q)      b_t = W_bq x_t  (Q K)      k and v likewise, v unturned
    o_t^h = sum_{s<=t} softmax_s(q_t^h . k_s^h / sqrt(K)) v_s^h

Memory is the factors of keys and values, (k_rank + v_rank) (n_heads + head_dim) numbers a token, positions included: a
turned sum is the sum of turned factors. Whole sequences and prompts make keys and values of them, single steps read the
factors as they lie. Initial weights are the authors'; their rope turns the other way round, which mirrored b undo.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.rope import rope
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.factored_attention import Factors, factored_attention, factored_attention_flops


class TPA(Mixer, name="tpa", family="attention"):
    paper = "Zhang et al. 2025, arXiv:2501.06425, sec. 3; layer as in tensorgi/TPA"
    use_when = "as attention with many heads, at a small part of its cache, and weights are to be few too"
    writes, erases = "a_k, b_k, a_v and b_v, beside all others", "nothing"
    decays, reads = "nothing", "softmax((a_k b_k) q)^T (a_v b_v)"
    train_order, decode_order = "T^2", "T"
    symbols = {"h": "n_heads", "d_h": "head_dim", "R_Q": "q_rank", "R_K": "k_rank", "R_V": "v_rank", "A": "a", "B": "b"}
    oracle = "the authors' layer in numpy, tests/oracles/latent_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64, at least 4
        head_dim: int | None = None  # width of a head; default d_model / n_heads
        q_rank: int = 6  # products that a query is the mean of
        k_rank: int = 2  # products that a key is the mean of
        v_rank: int = 2  # products that a value is the mean of
        rope_base: float = 10000.0  # base of the rotary positions

    config: Config
    tiny = Config(d_model=16, n_heads=3, head_dim=4, q_rank=5, k_rank=2, v_rank=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, free = config.d_model, config.head_dim and config.n_heads
        self.n_heads = free or heads(D, config.n_heads, min(64, max(1, D // 4)))
        self.head_dim = config.head_dim or D // self.n_heads
        if self.head_dim % 2:
            raise InputError(f"rotary positions turn pairs: head_dim {self.head_dim} must be even")
        self.ranks = {"q": config.q_rank, "k": config.k_rank, "v": config.v_rank}
        self.a_proj, self.b_proj = (
            nn.ModuleDict({n: Linear(D, width * rank, bias=False) for n, rank in self.ranks.items()})
            for width in (self.n_heads, self.head_dim)
        )
        for name, rank in self.ranks.items():  # Glorot's bounds, of the weight seen as (D H R) and (D R K)
            for line, fans in ((self.a_proj, (D + self.n_heads) * rank), (self.b_proj, (D + rank) * self.head_dim)):
                bound = (6 / fans) ** 0.5
                nn.init.uniform_(line.get_parameter(f"{name}.weight"), -bound, bound)
        self.o_proj = Linear(self.n_heads * self.head_dim, D, bias=False)

    def slots(self) -> dict[str, Slot]:
        H, K, ranks = self.n_heads, self.head_dim, {n: self.ranks[n] for n in "kv"}
        dims = {f"a_{n}": (0, H, r) for n, r in ranks.items()} | {f"b_{n}": (0, r, K) for n, r in ranks.items()}
        return {name: Slot(d, dtype=None, grows=True) for name, d in dims.items()}

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no cache."""
        q, k, v = self._factors(x, torch.zeros(x.shape[0], dtype=torch.long, device=x.device))
        return self.o_proj(attention(q.product(), k.product(), v.product()).flatten(2))

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """All that the cache holds is multiplied out."""
        q, k, v, kept = self._read_and_keep(x, self.reserve(state, x.shape[1]), lengths)
        filled = int(state.length.max()) + x.shape[1] if len(x) else 0
        k, v = (Factors(f.a[:, :filled], f.b[:, :filled]) for f in (k, v))
        o = attention(q.product(), k.product(), v.product(), state.length)
        return self.o_proj(o.flatten(2)), state.advance(x.shape[1] if lengths is None else lengths, **kept)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        q, k, v, kept = self._read_and_keep(x, state)
        o = factored_attention(q, k, v, state.length, self.head_dim**-0.5)
        return self.o_proj(o.flatten(2)), state.advance(1, **kept)

    def _factors(self, x: Float[Tensor, "B T D"], past: Int[Tensor, "B"]) -> list[Factors]:
        """Of q, k and v."""
        positions, factors = past[:, None] + torch.arange(x.shape[1], device=x.device), []
        for name, rank in self.ranks.items():
            a, b = self.a_proj[name](x).unflatten(-1, (-1, rank)), self.b_proj[name](x).unflatten(-1, (rank, -1))
            factors.append(Factors(a, b if name == "v" else rope(b, positions, self.config.rope_base)))
        return factors

    def _read_and_keep(self, x: Tensor, state: State, lengths: Tensor | None = None):
        """q of these tokens, k and v of all, and the new slots."""
        q, *new = self._factors(x, state.length)
        named = {f"{part}_{n}": t for n, f in zip("kv", new) for part, t in zip("ab", f)}
        kept = {n: write_cache(state[n], t, state.length, lengths) for n, t in named.items()}
        k, v = (Factors(kept[f"a_{n}"], kept[f"b_{n}"]) for n in "kv")
        return q, k, v, kept

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = (_mean(f) for f in self._factors(x, torch.zeros(x.shape[0], dtype=torch.long)))
        return self.o_proj(softmax_reference(q, k, v).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        H, K, (Q, R, V) = self.n_heads, self.head_dim, self.ranks.values()
        if mode == "step":
            return factored_attention_flops(T, B, H, K, (Q, R, V))
        return 2.0 * B * T * H * K * (Q + R + V) + attention_flops(T, B, H, K, mode)


def _mean(factors: Factors) -> Float[Tensor, "B T H K"]:
    """Product by product."""
    rank = factors.b.shape[2]
    return torch.stack([factors.a[..., r, None] * factors.b[:, :, r, None] for r in range(rank)]).mean(0)
