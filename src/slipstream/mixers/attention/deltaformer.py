r"""DeltaFormer: softmax attention whose every write first takes away what attention finds under its key.

    u_t = v_t - beta_t sum_{j<t} softmax_j(k_t . k_j / sqrt(K)) u_j        beta_t = sigmoid(W_b x_t + b)

    o_t = sum_{j<=t} softmax_j(q_t . k_j / sqrt(K)) u_j                    q, k with rotary positions

The delta rule in the feature space of softmax: memory grows with every token, and states can be tracked as by DeltaNet.
Keys look up keys, as in the paper, and so grouped heads need no more; fla's layer looks them up by q, and leaves beta
unbounded, where u may grow without end. Weights are named as in fla.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.delta_attention import delta_values, delta_values_flops
from slipstream.ops.delta_attention import reference as delta_reference


class DeltaFormer(Mixer, name="deltaformer", family="attention"):
    paper = "Zhong, Xu, Ao, Shi 2025, arXiv:2505.19488"
    use_when = "facts are overwritten or states tracked, and both must still be found word for word at any distance"
    writes, erases = "k and u, beside all others", "beta of what softmax finds under k"
    decays, reads = "nothing", "softmax(K q)^T U"
    train_order, decode_order = "T^2", "T"
    symbols = {"w": "k", "kappa": "exp", "beta": "beta"}
    oracle = "its operator: naive_deltaformer_attn of fla 0.6.0, tests/oracles/delta_family.npz"

    class Config(GroupedConfig):
        chunk_size: int = 64  # tokens whose values are solved for at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.qkv = GroupedQKV(config)
        self.b_proj = Linear(config.d_model, self.qkv.n_kv_heads)
        nn.init.zeros_(self.b_proj.bias)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.qkv.n_kv_heads, self.qkv.head_dim), dtype=None, grows=True)
        return {"k": cache, "u": cache, **self.qkv.slots()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.step(x, self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """As prefill, in a cache that has room already: init_state(B, max_len), or reserve."""
        q, k, v, convs = self.qkv(x, state, lengths)
        past, scale = state.length, self.qkv.head_dim**-0.5
        beta = self.b_proj(x).sigmoid()
        u = delta_values(k, k, v, beta, state["k"], state["u"], past, lengths, scale, self.config.chunk_size)
        k, u = write_cache(state["k"], k, past, lengths), write_cache(state["u"], u, past, lengths)
        o = attention(q, k, u, past, lengths=lengths)
        return self.o_proj(o.flatten(2)), state.advance(x.shape[1] if lengths is None else lengths, k=k, u=u, **convs)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv.reference(x)
        u = delta_reference(k, k, v, torch.sigmoid(self.b_proj(x)), self.qkv.head_dim**-0.5)
        return self.o_proj(softmax_reference(q, k, u).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        G, K = self.qkv.n_kv_heads, self.qkv.head_dim
        erased = delta_values_flops(T, B, G, K, K, mode, self.config.chunk_size)
        return erased + attention_flops(T, B, self.qkv.n_heads, K, mode)
