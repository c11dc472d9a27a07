r"""Block-local attention: a token sees what stands before it in its own block.

    o_t = sum_{s in G(t)} softmax_s(q_t . k_s / sqrt(K)) v_s        G(t) = {s <= t : floor(s / b) = floor(t / b)}

The cheapest exact pattern, and the weakest: nothing passes from one block to the next, and the first token of a block sees
itself alone. It is a part of hybrids, where another layer joins the blocks, and the measure for what a window adds. Blocks
begin at multiples of b; memory is one block. Sparse Transformer's fixed pattern is this with columns beside it.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.layers.sparse_lines import read_recent, recent_slots
from slipstream.ops.index_sets import Blocks
from slipstream.ops.sparse_attention import reference as sparse_reference
from slipstream.ops.sparse_attention import sparse_attention, sparse_attention_flops


class BlockLocal(Mixer, name="block_local", family="sparse"):
    paper = "Child, Gray, Radford, Sutskever 2019, arXiv:1904.10509, sec. 4: the first head of the fixed pattern"
    use_when = "another layer joins distant tokens, and what is left to do is exact and stands in one block"
    writes, erases = "k and v, beside those of the block", "nothing"
    decays, reads = "a block, all at once, when the next begins", "softmax(K q)^T V"
    symbols = {"b": "block"}
    oracle = "full attention over every block, tests/mixers/test_sparse_patterns.py"

    class Config(GroupedConfig):
        block: int = Field(128, ge=1)  # tokens of a block

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, block=6)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.qkv, self.index_set, self.reach = GroupedQKV(config), Blocks(config.block), config.block - 1
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return recent_slots(self.qkv, self.reach)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sparse_attention(q, k, v, self.index_set, state.length, first=state.length - self.reach)

        o, state = read_recent(self.qkv, x, state, lengths, read)
        return self.o_proj(o.flatten(2)), state

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(sparse_reference(*self.qkv.reference(x), self.index_set).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return sparse_attention_flops(T, B, self.qkv.n_heads, self.qkv.head_dim, self.index_set, mode)
