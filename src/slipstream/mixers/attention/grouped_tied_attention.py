r"""Grouped-tied attention (GTA): the values are also the first half of the keys; the other half all heads share.

    u_t = W_u x_t      r_t = rope(W_r x_t)      q_t = [a_t ; rope(b_t)] = W_q x_t
    o_t = sum_{s<=t} softmax_s((a_t . u_s[: K/2] + b_t . r_s) / sqrt(K)) u_s

Memory is n_kv_heads * head_dim numbers a token and half a head more: a little over half of grouped-query attention's. Only
the shared half is turned by positions, since values must not be. Single steps read the tied state as it lies. The bias that
W_r has in the authors' code is left out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.rope import rope
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.split_attention import split_attention, split_attention_flops


class GroupedTiedAttention(Mixer, name="grouped_tied_attention", family="attention"):
    paper = "Zadouri, Strauss, Dao 2025, arXiv:2505.21487; layer as in Dao-AILab/grouped-latent-attention"
    use_when = "as attention with grouped heads, at half its cache, when decoding is bound by reading the cache"
    writes, erases = "u and r, beside all others", "nothing"
    decays, reads = "nothing", "sum softmax(a . u[:K/2] + b . r) u"
    train_order, decode_order = "T^2", "T"
    symbols = {"KV": "kv", "K^RoPE": "k_rope", "h_kv": "n_kv_heads", "d_h": "head_dim"}
    oracle = "the authors' layer in numpy, tests/oracles/latent_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # query heads; default d_model / 64, at least 4
        n_kv_heads: int | None = None  # tied states, each for a group of query heads; default n_heads / 4
        rope_base: float = 10000.0  # base of the rotary positions

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D = config.d_model
        self.n_heads = heads(D, config.n_heads) if config.n_heads else 4 * heads(D // 4, None, min(64, D // 4))
        self.n_kv_heads, self.head_dim = config.n_kv_heads or max(1, self.n_heads // 4), D // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads {self.n_heads} does not divide into n_kv_heads {self.n_kv_heads} groups")
        if self.head_dim < 2:
            raise InputError(
                f"a head is turned in pairs: head_dim {self.head_dim} (d_model / n_heads) must be 2 or more"
            )
        self.rope_dim = max(2, self.head_dim // 4 * 2)  # half a head, or one pair less than would be half
        self.tied_dim = self.head_dim - self.rope_dim
        self.q_proj = Linear(D, D, bias=False)
        self.kv_proj = Linear(D, self.n_kv_heads * self.head_dim, bias=False)
        self.k_rope_proj = Linear(D, self.rope_dim, bias=False)
        self.o_proj = Linear(D, D, bias=False)

    def slots(self) -> dict[str, Slot]:
        tied, key = (0, self.n_kv_heads, self.head_dim), (0, 1, self.rope_dim)
        return {"kv": Slot(tied, dtype=None, grows=True), "k_rope": Slot(key, dtype=None, grows=True)}

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no cache."""
        q, turned, new = self._by_heads(x, torch.zeros(x.shape[0], dtype=torch.long, device=x.device))
        return self.o_proj(attention(torch.cat([q, turned], -1), self._keys(**new), new["kv"]).flatten(2))

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        state = self.reserve(state, x.shape[1])
        q, turned, new = self._by_heads(x, state.length)
        kept = {n: write_cache(state[n], t, state.length, lengths) for n, t in new.items()}
        o = attention(torch.cat([q, turned], -1), self._keys(**kept), kept["kv"], state.length)
        return self.o_proj(o.flatten(2)), state.advance(x.shape[1] if lengths is None else lengths, **kept)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        q, turned, new = self._by_heads(x, state.length)
        kept = {n: write_cache(state[n], t, state.length) for n, t in new.items()}
        parts = [(q, kept["kv"][..., : self.tied_dim]), (turned, kept["k_rope"])]
        o = split_attention(parts, kept["kv"], state.length, self.head_dim**-0.5)
        return self.o_proj(o.flatten(2)), state.advance(1, **kept)

    def _by_heads(self, x: Tensor, past: Int[Tensor, "B"]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Queries without positions and with, and what is kept."""
        positions = past[:, None] + torch.arange(x.shape[1], device=x.device)
        q, turned = self.q_proj(x).unflatten(-1, (self.n_heads, -1)).split([self.tied_dim, self.rope_dim], -1)
        key = rope(self.k_rope_proj(x)[:, :, None], positions, self.config.rope_base)
        kv = self.kv_proj(x).unflatten(-1, (self.n_kv_heads, -1))
        return q, rope(turned, positions, self.config.rope_base), {"kv": kv, "k_rope": key}

    def _keys(self, kv: Float[Tensor, "B S G K"], k_rope: Float[Tensor, "B S 1 R"]) -> Float[Tensor, "B S G K"]:
        return torch.cat([kv[..., : self.tied_dim], k_rope.expand(-1, -1, self.n_kv_heads, -1)], -1)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        a, b, new = self._by_heads(x, torch.zeros(x.shape[0], dtype=torch.long))
        u, r, group = new["kv"], new["k_rope"][:, :, 0], self.n_heads // self.n_kv_heads
        outputs = []
        for t in range(x.shape[1]):
            read = []
            for h in range(self.n_heads):
                tied = u[:, : t + 1, h // group]
                logits = torch.einsum("bk,bsk->bs", a[:, t, h], tied[..., : self.tied_dim])
                logits = logits + torch.einsum("bk,bsk->bs", b[:, t, h], r[:, : t + 1])
                weights = (logits / self.head_dim**0.5).softmax(-1)
                read.append(torch.einsum("bs,bsv->bv", weights, tied))
            outputs.append(self.o_proj(torch.cat(read, -1)))
        return torch.stack(outputs, 1)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        if mode == "step":
            return split_attention_flops(T, B, self.n_heads, (self.tied_dim, self.rope_dim), self.head_dim)
        return attention_flops(T, B, self.n_heads, self.head_dim, mode)
