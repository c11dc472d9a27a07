r"""Sparse Transformer: a token sees its neighbours, and far tokens that stand in columns.

    o_t = sum_{s in G(t)} softmax_s(q_t . k_s / sqrt(K)) v_s
    strided: G(t) = {t - l < s <= t} and {s <= t : (t - s) mod l = 0}
    fixed:   G(t) = {s <= t : floor(s / l) = floor(t / l)} and {s <= t : s mod l >= l - c}

Any token reaches any other in two layers. With l near the root of the length, both patterns keep T sqrt(T) pairs; at a
given l, T^2 / l. Strided suits what is periodic (images, music); fixed suits text, where the last c tokens of each block
sum it up. All heads see both parts, as in the paper's merged heads; its interleaved layers and its feed-forward are not
here. Nothing leaves the cache: a column is seen for ever.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.layers.sparse_lines import read_all
from slipstream.ops.index_sets import IndexSet, Strided, Window, fixed
from slipstream.ops.sparse_attention import reference as sparse_reference
from slipstream.ops.sparse_attention import sparse_attention, sparse_attention_flops


class SparseTransformer(Mixer, name="sparse_transformer", family="sparse"):
    paper = "Child, Gray, Radford, Sutskever 2019, arXiv:1904.10509, sec. 4.3"
    use_when = "sequences of some ten thousand tokens must be read whole, at a small part of the cost of full attention"
    writes, erases = "k and v, beside all others", "nothing"
    decays, reads = "nothing", "softmax(K q)^T V, over neighbours and columns"
    train_order = "T^2"
    decode_order = "T"
    symbols = {"l": "stride", "c": "summary"}
    oracle = "a float64 loop over the paper's sets, tests/oracles/sparse_patterns.npz"

    class Config(GroupedConfig):
        pattern: Literal["strided", "fixed"] = "fixed"  # columns a stride back from oneself, or at the ends of blocks
        stride: int = Field(64, ge=1)  # l: width of a window or block, and distance of columns; near the length's root
        summary: int = Field(8, ge=1)  # c: columns a block, of the fixed pattern; the paper takes 8, 16 or 32

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, stride=5, summary=2)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.pattern == "fixed" and config.summary > config.stride:
            raise InputError(
                f"summary {config.summary} is more than a block holds; it must be at most stride {config.stride}"
            )
        self.qkv, self.index_set = GroupedQKV(config), _pattern(config)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.qkv.n_kv_heads, self.qkv.head_dim), dtype=None, grows=True)
        return {"k": cache, "v": cache, **self.qkv.slots()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.step(x, self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """As prefill, in a cache that has room already: init_state(B, max_len), or reserve."""

        def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sparse_attention(q, k, v, self.index_set, state.length)

        o, state = read_all(self.qkv, x, state, lengths, read)
        return self.o_proj(o.flatten(2)), state

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(sparse_reference(*self.qkv.reference(x), self.index_set).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return sparse_attention_flops(T, B, self.qkv.n_heads, self.qkv.head_dim, self.index_set, mode)


def _pattern(config: SparseTransformer.Config) -> IndexSet:
    if config.pattern == "strided":
        return Window(config.stride) | Strided(config.stride)
    return fixed(config.stride, config.summary)
