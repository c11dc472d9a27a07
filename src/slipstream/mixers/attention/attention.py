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
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.attention import reference as softmax_reference


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

    class Config(GroupedConfig):
        causal: bool = True  # False: every token sees every other (encoders, diffusion)

    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.qkv = GroupedQKV(config)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.causal = config.causal

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.qkv.n_kv_heads, self.qkv.head_dim), dtype=None, grows=True)
        return {"k": cache, "v": cache, **self.qkv.slots()}

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no cache."""
        q, k, v, _ = self.qkv(x, self.init_state(x.shape[0]), lengths)
        return self.o_proj(attention(q, k, v, causal=self.causal, lengths=lengths).flatten(2))

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.step(x, self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """As prefill, in a cache that has room already: init_state(B, max_len), or reserve."""
        q, k, v, convs = self.qkv(x, state, lengths)
        k, v = write_cache(state["k"], k, state.length, lengths), write_cache(state["v"], v, state.length, lengths)
        o = attention(q, k, v, state.length, causal=self.causal, lengths=lengths)
        return self.o_proj(o.flatten(2)), state.advance(x.shape[1] if lengths is None else lengths, k=k, v=v, **convs)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv.reference(x)
        return self.o_proj(softmax_reference(q, k, v, causal=self.causal).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return attention_flops(T, B, self.qkv.n_heads, self.qkv.head_dim, mode)
