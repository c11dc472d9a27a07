r"""Keys and values as one low-rank latent a token, and a key with positions that all heads share (DeepSeek-V2's MLA).

    c_t = norm(W_a x_t)      [k_t^h ; v_t^h] = W_b^h c_t      r_t = rope(W_r x_t)
    l_ts = (q_t^h . k_s^h + rope(u_t^h) . r_s) / sqrt(n + r)      [q_t^h ; u_t^h] = W_q x_t,  or W_qb norm(W_qa x_t)

Only c_t and r_t are kept. They are read in two ways, which give the same: `expand` makes keys and values of every head, for
many queries; `absorb` moves W_b to the other side of both products, so that a single query reads the latents as they lie:

    q . W_k c = (W_k^T q) . c          sum_s p_s W_v c_s = W_v (sum_s p_s c_s)

With n_latents = L there are L latents, each for a group of the heads and normed by itself (Zadouri et al. 2025's GLA). Weights
are named as in DeepSeek's checkpoints, but rope turns half-split pairs: their interleaved rows are put in our order on loading.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import PositiveFloat
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import State
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.layers.rope import rope
from slipstream.layers.rope_scaling import rope_scaling
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.rms_norm import rms_norm
from slipstream.ops.softmax import Softmax
from slipstream.ops.split_attention import split_attention, split_attention_flops


class LatentConfig(MixerConfig):
    """Settings of every mixer with latent keys and values."""

    n_heads: int | None = None  # query heads; default d_model / 64
    kv_rank: int | None = None  # width of a latent
    q_rank: int | None = None  # width of a latent that queries are made of; default none, they are made of x
    nope_head_dim: int | None = None  # width of a head's key without positions; default d_model / n_heads
    rope_head_dim: int | None = None  # width of the key with positions that heads share; default nope_head_dim / 2
    v_head_dim: int | None = None  # width of a head's value; default nope_head_dim
    rope_base: float | None = 10000.0  # base of the rotary positions; None leaves the shared key as it is
    rope_scaling: str | None = None  # positions stretched beyond the trained length, e.g. yarn:factor=40:original=4096
    qk_scale: PositiveFloat | None = None  # factor on logits; default 1 / sqrt(nope_head_dim + rope_head_dim)


class LatentKV(nn.Module):
    """All weights of a mixer with latent keys and values, o_proj among them, and what it does with them."""

    def __init__(self, config: LatentConfig, n_heads: int, kv_rank: int, n_latents: int = 1) -> None:
        super().__init__()
        self.n_heads, self.kv_rank, self.n_latents, self.rope_base = n_heads, kv_rank, n_latents, config.rope_base
        self.nope = config.nope_head_dim or config.d_model // n_heads
        self.rope = config.rope_head_dim or max(2, self.nope // 4 * 2)
        self.value = config.v_head_dim or self.nope
        self.scaling, self.qk_scale = rope_scaling(config.rope_scaling), config.qk_scale
        self._check()
        D, queries = config.d_model, n_heads * (self.nope + self.rope)
        if config.q_rank:
            self.q_a_proj = Linear(D, config.q_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_rank)
            self.q_b_proj = Linear(config.q_rank, queries, bias=False)
        else:
            self.q_proj = Linear(D, queries, bias=False)
        self.low_rank_q = bool(config.q_rank)
        self.kv_a_proj_with_mqa = Linear(D, n_latents * kv_rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(n_latents * kv_rank)
        self.kv_b_proj = Linear(kv_rank, n_heads * (self.nope + self.value), bias=False)
        self.o_proj = Linear(n_heads * self.value, D, bias=False)

    def _check(self) -> None:
        if self.n_heads % self.n_latents:
            raise InputError(
                f"n_heads {self.n_heads} does not divide into {self.n_latents} groups, one for each latent"
            )
        if self.rope % 2:
            raise InputError(f"rotary positions turn pairs: rope_head_dim {self.rope} must be even")
        if self.scaling and not self.rope_base:
            raise InputError(f"rope_scaling {self.scaling} stretches rotary positions: set rope_base too")

    @property
    def scale(self) -> float:
        return self.qk_scale or (self.nope + self.rope) ** -0.5

    @property
    def softmax(self) -> Softmax:
        return Softmax(self.qk_scale)

    def low_rank(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T Q"]:
        """What queries are made of."""
        return self.q_a_layernorm(self.q_a_proj(x)) if self.low_rank_q else x

    def queries(
        self, low: Float[Tensor, "B T Q"], positions: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T H N"], Float[Tensor, "B T H R"]]:
        """Of low_rank(x): without positions, and with."""
        make = self.q_b_proj if self.low_rank_q else self.q_proj
        q = make(low).unflatten(-1, (self.n_heads, -1))
        return q[..., : self.nope], self._turned(q[..., self.nope :], positions)

    def latents(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T L C"], Float[Tensor, "B T 1 R"]]:
        """What is kept: c_kv and k_rope."""
        c, key = self.kv_a_proj_with_mqa(x).split([self.n_latents * self.kv_rank, self.rope], -1)
        c = rms_norm(c.unflatten(-1, (self.n_latents, -1)), eps=self.kv_a_layernorm.eps)
        return c * self.kv_a_layernorm.weight.unflatten(0, (self.n_latents, -1)), self._turned(
            key[:, :, None], positions
        )

    def expand(
        self, c_kv: Float[Tensor, "B S L C"], k_rope: Float[Tensor, "B S 1 R"]
    ) -> tuple[Float[Tensor, "B S H K"], Float[Tensor, "B S H V"]]:
        """Keys and values of every head."""
        kv = torch.einsum("bslc,lhkc->bslhk", c_kv, self._by_latents()).flatten(2, 3)
        k, v = kv.split([self.nope, self.value], -1)
        return torch.cat([k, k_rope.expand(-1, -1, self.n_heads, -1)], -1), v

    def absorb(self, q: Float[Tensor, "B T H N"]) -> Float[Tensor, "B T H C"]:
        """Queries that meet latents as they met keys."""
        q = q.unflatten(2, (self.n_latents, -1))
        return torch.einsum("btlhn,lhnc->btlhc", q, self._by_latents()[:, :, : self.nope]).flatten(2, 3)

    def values(self, o: Float[Tensor, "B T H C"]) -> Float[Tensor, "B T H V"]:
        """What was read of latents, as what would have been read of values."""
        o = o.unflatten(2, (self.n_latents, -1))
        return torch.einsum("btlhc,lhvc->btlhv", o, self._by_latents()[:, :, self.nope :]).flatten(2, 3)

    def _by_latents(self) -> Float[Tensor, "L H K C"]:
        """W_b: a latent's heads, and the rows of each."""
        return self.kv_b_proj.weight.unflatten(0, (self.n_latents, self.n_heads // self.n_latents, -1))

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        if not self.rope_base:
            return x
        x = rope(x, positions, self.rope_base, self.scaling)
        return x if self.scaling is None or self.scaling.magnitude == 1 else x * self.scaling.magnitude

    def whole(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Whole sequences, expanded, without a cache."""
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        k, v = self.expand(*self.latents(x, positions))
        return self._output(
            attention(torch.cat(self.queries(self.low_rank(x), positions), -1), k, v, softmax=self.softmax)
        )

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """Always expanded, all that the cache holds too: the less work from some hundred tokens on. The cache has room."""
        (q, turned), kept = self._read_and_keep(x, state, lengths)
        filled = int(state.length.max()) + x.shape[1] if len(x) else 0
        k, v = self.expand(kept["c_kv"][:, :filled], kept["k_rope"][:, :filled])
        y = self._output(attention(torch.cat([q, turned], -1), k, v, state.length, softmax=self.softmax))
        return y, state.advance(x.shape[1] if lengths is None else lengths, **kept)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """Always absorbed."""
        (q, turned), kept = self._read_and_keep(x, state)
        parts = [(self.absorb(q), kept["c_kv"]), (turned, kept["k_rope"])]
        o = split_attention(parts, kept["c_kv"], state.length, self.scale)
        return self._output(self.values(o)), state.advance(1, **kept)

    def _read_and_keep(self, x: Tensor, state: State, lengths: Tensor | None = None):
        positions = state.length[:, None] + torch.arange(x.shape[1], device=x.device)
        new = dict(zip(("c_kv", "k_rope"), self.latents(x, positions)))
        kept = {n: write_cache(state[n], t, state.length, lengths) for n, t in new.items()}
        return self.queries(self.low_rank(x), positions), kept

    def _output(self, o: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(o.flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Token by token and head by head."""
        positions = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        (q, turned), (c, key) = self.queries(self.low_rank(x), positions), self.latents(x, positions)
        rows, group = self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1)), self.n_heads // self.n_latents
        outputs = []
        for t in range(x.shape[1]):
            heads = []
            for h in range(self.n_heads):
                k, v = (c[:, : t + 1, h // group] @ rows[h].T).split([self.nope, self.value], -1)
                logits = torch.einsum("bn,bsn->bs", q[:, t, h], k) + torch.einsum(
                    "br,bsr->bs", turned[:, t, h], key[:, : t + 1, 0]
                )
                heads.append(torch.einsum("bs,bsv->bv", (logits * self.scale).softmax(-1), v))
            outputs.append(self.o_proj(torch.cat(heads, -1)))
        return torch.stack(outputs, 1)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        """Beside the linear layers. kv_b_proj counts the same for a token whether expanded or absorbed."""
        if mode == "step":
            return split_attention_flops(T, B, self.n_heads, (self.kv_rank, self.rope), self.kv_rank)
        return attention_flops(T, B, self.n_heads, max(self.nope + self.rope, self.value), mode)


class LatentMixer(Mixer):
    """Abstract. A mixer that does with its `latent` what LatentKV does; it states its slots."""

    latent: LatentKV

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no cache."""
        return self.latent.whole(x)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.latent.prefill(x, self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        return self.latent.step(x, state)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.latent.reference(x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return self.latent.op_flops(T, B, mode)


def one_latent(config: LatentConfig) -> LatentKV:
    """One latent for all heads: 4 nope_head_dim wide, at most d_model / 2, if kv_rank does not say otherwise."""
    n_heads = config.n_heads if config.nope_head_dim and config.n_heads else heads(config.d_model, config.n_heads)
    return LatentKV(
        config,
        n_heads,
        config.kv_rank or min(4 * (config.nope_head_dim or config.d_model // n_heads), config.d_model // 2),
    )
