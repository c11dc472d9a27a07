r"""Longformer: a sliding window, dilated for some heads, and first tokens that all see.

    o_t = sum_{s in G(t)} softmax_s(q_t . k_s / sqrt(K)) v_s        G(t) = {s <= t : s < n  or  t - W d < s, d divides t - s}
    o_t = sum_{s <= t} softmax_s(q'_t . k'_s / sqrt(K)) v'_s        for the global tokens t < n

A head with dilation d reaches d times as far at the same cost. Global tokens are read by all through the same keys as
others, and read with projections of their own (q', k', v'). Memory is the last W d tokens and the first n. causal=False
is the encoder's form: W / 2 tokens on each side of oneself, global tokens that see all; it reads whole sequences only. In
the paper q', k', v' start as copies of the trained q, k, v; here they start by themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.layers.sparse_lines import first_tokens, read_recent, recent_slots
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.index_sets import Global, IndexSet, Window
from slipstream.ops.softmax import read
from slipstream.ops.sparse_attention import reference as sparse_reference
from slipstream.ops.sparse_attention import sparse_attention, sparse_attention_flops
from slipstream.ops.valid import valid_mask, zero_padding


class Longformer(Mixer, name="longformer", family="sparse"):
    paper = "Beltagy, Peters, Cohan 2020, arXiv:2004.05150, sec. 3"
    use_when = "what matters is near or stands at the start (a task, a heading), and memory must not grow with the text"
    writes, erases = "k and v, beside the last W d and the first n", "nothing"
    decays, reads = "what leaves the window, all at once", "softmax(K q)^T V"
    symbols = {"W": "window", "d": "dilation", "n": "n_global", "q', k', v'": "qkv_global"}
    oracle = "transformers LongformerSelfAttention for causal=False, tests/oracles/test_sparse_pattern_oracles.py"

    class Config(GroupedConfig):
        window: int = Field(128, ge=1)  # W: tokens seen, oneself included; W / 2 to each side where causal is false
        dilation: int = Field(4, ge=1)  # d: of the dilated heads
        n_dilated: int = Field(0, ge=0)  # key heads that are dilated, the last ones
        n_global: int = Field(1, ge=0)  # n: first tokens, which all see
        causal: bool = True  # False: the encoder's form, both sides seen

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, window=4, dilation=3, n_dilated=1, n_global=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.qkv, self.n = GroupedQKV(config), config.n_global
        if config.n_dilated > self.qkv.n_kv_heads:
            raise InputError(f"n_dilated {config.n_dilated} is more than there are key heads: {self.qkv.n_kv_heads}")
        self.reach = (config.window - 1) * (config.dilation if config.n_dilated else 1)
        self.qkv_global = GroupedQKV(config.model_copy(update={"conv_size": 0})) if self.n else None
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        first = Slot((self.n, self.qkv.n_kv_heads, self.qkv.head_dim), dtype=None)
        names = ("first_k", "first_v", "global_k", "global_v") if self.n else ()
        return recent_slots(self.qkv, self.reach) | dict.fromkeys(names, first)

    def index_sets(self) -> list[tuple[int, IndexSet]]:
        """How many key heads share a set, and the set."""
        c, plain = self.config, self.qkv.n_kv_heads - self.config.n_dilated
        w = c.window if c.causal else c.window // 2 + 1
        sets = [(plain, 1), (c.n_dilated, c.dilation)]
        return [(heads, Global(self.n) | Window(w, d) if self.n else Window(w, d)) for heads, d in sets if heads]

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if self.config.causal:
            return super()._from_fresh(x, lengths)
        state = self.init_state(x.shape[0])
        past, (q, k, v, _) = state.length, self.qkv(zero_padding(x, lengths), state, lengths)
        o = self._by_heads(lambda q, k, v, s: sparse_attention(q, k, v, s, past, None, 0, lengths, False), q, k, v)
        if self.qkv_global is not None:
            q, k, v, _ = self.qkv_global(zero_padding(x, lengths), state)
            real = None if lengths is None else valid_mask(lengths, x.shape[1])[:, None, None]
            o = torch.cat([read(q[:, : self.n], k, v, real), o[:, self.n :]], 1)
        return self.o_proj(o.flatten(2))

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        if not self.config.causal:
            raise InputError("longformer with causal false reads whole sequences: call forward, or set causal true")
        past, kept = state.length, {}

        def read_lines(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.n:
                new = {"first_k": k[:, self.reach :], "first_v": v[:, self.reach :]}
                kept.update({name: first_tokens(state[name], line, past, lengths) for name, line in new.items()})
                k, v = torch.cat([kept["first_k"], k], 1), torch.cat([kept["first_v"], v], 1)
            first = past - self.reach
            return self._by_heads(lambda q, k, v, s: sparse_attention(q, k, v, s, past, first, self.n), q, k, v)

        o, after = read_recent(self.qkv, x, state, lengths, read_lines)
        if self.qkv_global is not None:
            o = self._global_tokens(o, x, state, lengths, kept)
        return self.o_proj(o.flatten(2)), after.advance(0, **kept)

    def _global_tokens(
        self, o: Tensor, x: Tensor, state: State, lengths: Tensor | None, kept: dict[str, Tensor]
    ) -> Float[Tensor, "B T H K"]:
        """The outputs with those of global tokens, which can only be among the first n tokens of a call; keeps their keys."""
        q, k, v, _ = self.qkv_global(x[:, : self.n], state)
        least = None if lengths is None else lengths.clamp(max=self.n)
        new = {"global_k": k, "global_v": v}
        kept.update({name: first_tokens(state[name], line, state.length, least) for name, line in new.items()})
        t = state.length[:, None] + torch.arange(q.shape[1], device=x.device)
        sees: Bool[Tensor, "B T n"] = torch.arange(self.n, device=x.device) <= t[..., None]
        whole = read(q, kept["global_k"], kept["global_v"], sees[:, None])
        among = torch.where((t < self.n)[..., None, None], whole, o[:, : self.n])
        return torch.cat([among, o[:, self.n :]], 1)

    def _by_heads(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "B T H K"]:
        """Heads that share a set, together."""
        counts, index_sets = zip(*self.index_sets(), strict=True)
        share = q.shape[2] // k.shape[2]
        lines = zip(q.split([share * n for n in counts], 2), k.split(counts, 2), v.split(counts, 2), strict=True)
        return torch.cat([attend(*line, s) for line, s in zip(lines, index_sets, strict=True)], 2)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        causal = self.config.causal
        o = self._by_heads(lambda q, k, v, s: sparse_reference(q, k, v, s, causal), *self.qkv.reference(x))
        if self.qkv_global is not None:
            whole = softmax_reference(*self.qkv_global.reference(x), causal=causal)
            o = torch.cat([whole[:, : self.n], o[:, self.n :]], 1)
        return self.o_proj(o.flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        share, K = self.qkv.n_heads // self.qkv.n_kv_heads, self.qkv.head_dim
        near = sum(sparse_attention_flops(T, B, share * n, K, s, mode) for n, s in self.index_sets())
        if self.qkv_global is None:
            return near
        tokens = 1 if mode == "step" else T
        read_globally = min(tokens, self.n)
        projections = sum(m.weight.numel() for m in self.qkv_global.modules() if isinstance(m, Linear))
        products = 4.0 * B * self.qkv.n_heads * K * read_globally * (self.n if self.config.causal else T)
        return near + products - (2.0 * B * projections * (tokens - read_globally) if self.config.causal else 0)
