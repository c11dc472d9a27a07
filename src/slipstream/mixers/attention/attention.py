r"""Softmax attention with rotary positions: multi-head, grouped-query and multi-query by n_kv_heads.

    o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s

Memory grows with every token (the key-value cache): 2 * n_kv_heads * head_dim numbers a token. An optional short
convolution on q, k, v (conv_size) gives it the neighbour access that recurrent mixers have.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.norm import rms_norm
from slipstream.layers.rope import rope
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.attention import reference as softmax_reference


class Attention(Mixer, name="attention", family="attention"):
    paper = "Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped heads: Ainslie et al. 2023, arXiv:2305.13245; rope: arXiv:2104.09864"
    use_when = "facts must be found again word for word at any distance, and memory that grows with the text is affordable"
    train_order, decode_order = "T^2", "T"
    symbols = {"Q": "q", "K": "k", "V": "v", "d_k": "head_dim"}
    oracle = "transformers LlamaForCausalLM, tests/oracles/test_transformers.py"

    class Config(MixerConfig):
        n_heads: int | None = None  # query heads; default d_model / 64
        n_kv_heads: int | None = None  # key and value heads shared by groups of query heads; default n_heads, 1 is multi-query
        rope_base: float | None = 10000.0  # base of the rotary positions; None for no positions (NoPE)
        qk_norm: bool = False  # RMS-normalise q and k per head before the product
        conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none
        causal: bool = True  # False: every token sees every other (encoders, diffusion)

    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.n_kv_heads = config.n_kv_heads or self.n_heads
        self.head_dim = config.d_model // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads {self.n_heads} does not divide into n_kv_heads {self.n_kv_heads} groups")
        kv_width = self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        widths = {"q": config.d_model, "k": kv_width, "v": kv_width} if config.conv_size else {}
        self.convs = nn.ModuleDict({n: ShortConv(w, config.conv_size) for n, w in widths.items()})

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.n_kv_heads, self.head_dim), dtype=None, grows=True)
        return {"k": cache, "v": cache, **{f"conv_{n}": c.slot() for n, c in self.convs.items()}}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        state = self.reserve(state, x.shape[1])
        q, k, v, convs = self.project(x, state, lengths)
        keys, values = write_cache(state["k"], k, state.length, lengths), write_cache(state["v"], v, state.length, lengths)
        o = attention(q, keys, values, state.length, causal=self.config.causal, lengths=lengths)
        y = self.o_proj(o.flatten(2))
        return y, state.advance(x.shape[1] if lengths is None else lengths, k=keys, v=values, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """Needs room in the cache: init_state(B, max_len), or reserve."""
        q, k, v, convs = self.project(x, state, None)
        keys, values = write_cache(state["k"], k, state.length), write_cache(state["v"], v, state.length)
        o = attention(q, keys, values, state.length, causal=self.config.causal)
        return self.o_proj(o.flatten(2)), state.advance(1, k=keys, v=values, **convs)

    def project(self, x: Tensor, state: State, lengths: Tensor | None):
        """q, k, v by heads with convolution, norm and positions, and the convolutions' new states."""
        line = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        convs = {}
        for name, conv in self.convs.items():
            line[name], convs[f"conv_{name}"] = conv(line[name], state[f"conv_{name}"], lengths)
        positions = state.length[:, None] + torch.arange(x.shape[1], device=x.device)
        return *self._by_heads(line, positions), convs

    def _by_heads(self, line: dict[str, Tensor], positions: Tensor) -> list[Tensor]:
        q, k, v = (line[n].unflatten(-1, (-1, self.head_dim)) for n in "qkv")
        if self.config.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if self.config.rope_base:
            q, k = rope(q, positions, self.config.rope_base), rope(k, positions, self.config.rope_base)
        return [q, k, v]

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        line = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        line |= {n: conv.reference(line[n]) for n, conv in self.convs.items()}
        q, k, v = self._by_heads(line, torch.arange(x.shape[1]).expand(x.shape[0], -1))
        return self.o_proj(softmax_reference(q, k, v, causal=self.config.causal).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return attention_flops(T, B, self.n_heads, self.head_dim, mode)
