r"""Softmax attention with rotary positions: multi-head, grouped-query and multi-query by n_kv_heads.

    o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s

Memory grows with every token (the key-value cache): 2 * n_kv_heads * head_dim numbers a token. An optional short
convolution on q, k, v (conv_size) gives it the neighbour access that recurrent mixers have.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedQKV
from slipstream.ops.attention import attention, attention_flops
from slipstream.ops.attention import reference as softmax_reference
from slipstream.policies.config import PolicyConfig
from slipstream.policies.policy import KVHeads, Reading, cache_policy, prefill_policy


class Attention(Mixer, name="attention", family="attention"):
    paper = "Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped heads: Ainslie et al. 2023, arXiv:2305.13245"
    use_when = (
        "facts must be found again word for word at any distance, and memory that grows with the text is affordable"
    )
    writes, erases = "k and v, beside all others", "nothing"
    decays, reads = "nothing", "softmax(K q)^T V"
    train_order = "T^2"
    decode_order = "T"
    symbols = {"Q": "q", "K": "k", "V": "v", "d_k": "head_dim"}
    oracle = "transformers LlamaForCausalLM, tests/oracles/test_attention_oracles.py"

    class Config(PolicyConfig):
        causal: bool = True  # False: every token sees every other (encoders, diffusion)

    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.qkv, self.causal = GroupedQKV(config), config.causal
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        kv = KVHeads(self.qkv.n_heads, self.qkv.n_kv_heads, self.qkv.head_dim, self.qkv.head_dim)
        self.cache, self.prompt = cache_policy(config.cache, kv), prefill_policy(config.prefill_policy, config.causal)

    def slots(self) -> dict[str, Slot]:
        return {**self.cache.slots(), **self.qkv.slots()}

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no cache, and knows no policies."""
        q, k, v, _ = self.qkv(x, self.init_state(x.shape[0]), lengths)
        return self.o_proj(attention(q, k, v, causal=self.causal, lengths=lengths).flatten(2))

    def _reading(self) -> Reading:
        return Reading(self.prompt, turn=self.qkv.turn)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        state = self.reserve(state, x.shape[1])
        q, k, v, convs = self.qkv(x, state, lengths)
        o, kept = self.cache.prefill(q, k, v, state, lengths, self._reading())
        return self.o_proj(o.flatten(2)), state.advance(x.shape[1] if lengths is None else lengths, **kept, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        q, k, v, convs = self.qkv(x, state)
        o, kept = self.cache.step(q, k, v, state, self._reading())
        return self.o_proj(o.flatten(2)), state.advance(1, **kept, **convs)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv.reference(x)
        return self.o_proj(softmax_reference(q, k, v, causal=self.causal).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return attention_flops(T, B, self.qkv.n_heads, self.qkv.head_dim, mode)
