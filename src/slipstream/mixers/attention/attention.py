r"""Softmax attention with rotary positions: multi-head, grouped-query and multi-query by n_kv_heads.

    o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s

Memory grows with every token (the key-value cache): 2 * n_kv_heads * head_dim numbers a token. An optional short
convolution on q, k, v (conv_size) gives it the neighbour access that recurrent mixers have. The settings cover what Llama,
Qwen, Gemma 2 and 3, OLMo 2, GPT-NeoX and gpt-oss do between x and y, with positions stretched (YaRN and the like) or not.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.errors import InputError
from slipstream.core.lender import Lender, Lent
from slipstream.core.mixer import Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.layers.softmax_heads import joined
from slipstream.ops.attention import attention, attention_flops
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.softmax import Softmax
from slipstream.policies.config import PolicyConfig
from slipstream.policies.policy import KVHeads, Reading, cache_policy, prefill_policy


class Attention(Lender, name="attention", family="attention"):
    paper = "Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped heads: Ainslie et al. 2023, arXiv:2305.13245"
    use_when = (
        "facts must be found again word for word at any distance, and memory that grows with the text is affordable"
    )
    writes, erases = "k and v, beside all others", "nothing"
    decays, reads = "nothing", "softmax(K q)^T V"
    train_order = "T^2"
    decode_order = "T"
    symbols = {"Q": "q", "K": "k", "V": "v", "d_k": "head_dim"}
    oracle = (
        "transformers LlamaForCausalLM, tests/oracles/test_attention_oracles.py; its settings against Qwen3, Gemma 2, gpt-oss and "
        "Qwen3-Next, tests/oracles/test_attention_settings_oracles.py"
    )

    class Config(PolicyConfig):
        causal: bool = True  # False: every token sees every other (encoders, diffusion)
        own_kv: bool = True  # False: reads the keys and values of the attention layer before it (CLA, YOCO)

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.causal, self.own_kv = config.causal, config.own_kv
        self.qkv = GroupedQKV(config, config.own_kv, config.head_dim)
        self.sinks = nn.Parameter(torch.zeros(self.qkv.n_heads)) if config.sinks else None
        self.o_proj = Linear(self.qkv.width, config.d_model, bias=config.o_bias)
        self.g_proj = Linear(config.d_model, self.qkv.width, bias=False) if config.gated else None
        kv = KVHeads(self.qkv.n_heads, self.qkv.n_kv_heads, self.qkv.head_dim, self.qkv.head_dim)
        self.cache, self.prompt = (
            cache_policy(config.cache, kv, config.causal),
            prefill_policy(config.prefill_policy, config.causal),
        )
        if not self.own_kv and (policies := (config.cache, config.prefill_policy)) != ("full", "dense"):
            raise InputError(
                f"layers that share a cache read all of it: cache full, prefill_policy dense, not {policies}"
            )

    def slots(self) -> dict[str, Slot]:
        return {**(self.cache.slots() if self.own_kv else {}), **self.qkv.slots()}

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.share_fresh(x, None, lengths)[0]

    def share_fresh(self, x: Float[Tensor, "B T D"], lent: Lent | None = None, lengths: Int[Tensor, "B"] | None = None):
        """Training needs no cache, and knows no policies."""
        fresh = self.init_state(x.shape[0])
        q, k, v = self.qkv(x, fresh, lengths)[:3] if lent is None else (self.qkv.queries(x, fresh, lengths)[0], *lent)
        o = attention(q, k, v, causal=self.causal, lengths=lengths, softmax=self._softmax())
        return self.o_proj(joined(o, x, self.g_proj)), (k, v)

    def _softmax(self) -> Softmax:
        return Softmax(self.config.qk_scale, self.config.softcap, self.sinks)

    def _reading(self) -> Reading:
        return Reading(self.prompt, self._softmax(), self.qkv.turn)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        state = self.reserve(state, x.shape[1])
        q, k, v, convs = self.qkv(x, state, lengths)
        o, kept = self.cache.prefill(q, k, v, state, lengths, self._reading())
        return self.o_proj(joined(o, x, self.g_proj)), state.advance(
            x.shape[1] if lengths is None else lengths, **kept, **convs
        )

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        q, k, v, convs = self.qkv(x, state)
        o, kept = self.cache.step(q, k, v, state, self._reading())
        return self.o_proj(joined(o, x, self.g_proj)), state.advance(1, **kept, **convs)

    def share_prefill(
        self,
        x: Float[Tensor, "B T D"],
        state: State,
        lent: Lent | None = None,
        lengths: Int[Tensor, "B"] | None = None,
    ):
        return (
            self._lending(*self.prefill(x, state, lengths)) if lent is None else self._borrow(x, state, lent, lengths)
        )

    def share_step(self, x: Float[Tensor, "B 1 D"], state: State, lent: Lent | None = None):
        return self._lending(*self.step(x, state)) if lent is None else self._borrow(x, state, lent, None)

    def _lending(self, y: Tensor, state: State) -> tuple[Tensor, State, Lent]:
        return y, state, (state["k"], state["v"])

    def _borrow(self, x: Tensor, state: State, lent: Lent, lengths: Tensor | None) -> tuple[Tensor, State, Lent]:
        """lent: the caches of another, these tokens included."""
        (q, convs), (k, v) = self.qkv.queries(x, state, lengths), lent
        o = attention(q, k, v, state.length, self.causal, lengths, self._softmax())
        new = state.advance(x.shape[1] if lengths is None else lengths, **convs)
        return self.o_proj(joined(o, x, self.g_proj)), new, lent

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv.reference(x)
        o = softmax_reference(q, k, v, causal=self.causal, softmax=self._softmax())
        return self.o_proj(joined(o, x, self.g_proj))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return attention_flops(T, B, self.qkv.n_heads, self.qkv.head_dim, mode)
