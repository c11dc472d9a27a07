r"""BigBird: blocks of tokens see the first block, the blocks around them, and some drawn by lot.

    o_t = sum_{s in G(t)} softmax_s(q_t . k_s / sqrt(K)) v_s
    G(t) = {s <= t : blk(s) < g  or  blk(t) - w < blk(s) <= blk(t)  or  blk(s) in R(blk(t))}        blk(t) = floor(t / b)

Work is a constant number of blocks a token; by the drawn blocks any token is a few layers from any other. R(j) holds r
earlier blocks, drawn anew for each block and each key head, each from one r-th of those that are left: the same at every
call, so that a token sees the same past whether it is read alone or in a prompt. Nothing leaves the cache: any block may
be drawn later. The paper is about encoders: causal=False is its ITC form, with w blocks around oneself, the first and the
last g blocks seen by all and seeing all, and blocks drawn from both sides; it reads whole sequences only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.layers.sparse_lines import read_all
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.index_sets import Global, IndexSet, RandomBlocks, Segments
from slipstream.ops.softmax import read
from slipstream.ops.sparse_attention import reference as sparse_reference
from slipstream.ops.sparse_attention import sparse_attention, sparse_attention_flops


class BigBird(Mixer, name="bigbird", family="sparse"):
    paper = "Zaheer et al. 2020, arXiv:2007.14062, sec. 2"
    use_when = "long texts are read at a constant cost a token, and far tokens matter, though not which ones"
    writes, erases = "k and v, beside all others", "nothing"
    decays, reads = "nothing", "softmax(K q)^T V, over the first, the near and the drawn blocks"
    symbols = {"b": "block", "g": "n_global", "w": "n_window", "r": "n_random"}
    oracle = "transformers BigBirdModel, block_sparse, for causal=False; tests/oracles/test_sparse_pattern_oracles.py"

    class Config(GroupedConfig):
        block: int = Field(32, ge=1)  # b: tokens of a block
        n_window: int = Field(3, ge=1)  # w: blocks seen around one's own, it included; the last ones where causal
        n_global: int = Field(1, ge=0)  # g: first blocks, which all see
        n_random: int = Field(3, ge=0)  # r: blocks drawn for each block
        seed: int = 0  # of the draw; another one for every layer joins more tokens
        causal: bool = True  # False: the encoder's form, both sides seen

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, block=2, n_window=3, n_global=1, n_random=2)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.qkv = GroupedQKV(config)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)
        if not config.causal and config.n_window % 2 == 0:
            raise InputError(
                f"n_window {config.n_window} must be odd where causal is false: as many blocks on both sides"
            )

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.qkv.n_kv_heads, self.qkv.head_dim), dtype=None, grows=True)
        return {"k": cache, "v": cache, **self.qkv.slots()}

    def index_sets(self, blocks: int = 0) -> list[IndexSet]:
        """One for each key head; blocks: how many there are, where the future is seen."""
        c = self.config
        back = c.n_window - 1 if c.causal else c.n_window // 2
        shared = Global(c.n_global * c.block) | Segments(c.block, back)
        end = 0
        if not c.causal:
            end = blocks - c.n_global
            shared = shared | Global(c.n_global * c.block, at=max(0, end) * c.block)
        if c.n_random == 0:
            return [shared] * self.qkv.n_kv_heads
        lots = [c.seed * self.qkv.n_kv_heads + g for g in range(self.qkv.n_kv_heads)]
        return [shared | RandomBlocks(c.block, c.n_random, lot, c.n_global, back + 1, end) for lot in lots]

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if self.config.causal:
            return super()._from_fresh(x, lengths)
        q, k, v, _ = self.qkv(x, self.init_state(x.shape[0]), lengths)
        if lengths is None:
            return self.o_proj(self._both_sides(q, k, v).flatten(2))
        o = torch.zeros_like(q)
        for b, n in enumerate(lengths.tolist()):  # each row has a last block of its own
            o[b, :n] = self._both_sides(*(line[b : b + 1, :n] for line in (q, k, v)))[0]
        return self.o_proj(o.flatten(2))

    def _both_sides(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "B T H K"]:
        past, ends = torch.zeros(q.shape[0], dtype=torch.long, device=q.device), self._globals(q.shape[1])
        o = self._by_key_heads(q, k, v, lambda q, k, v, s: sparse_attention(q, k, v, s, past, causal=False))
        return torch.where(ends[:, None, None], _spread(read(q[:, ends], k, v), ends), o)

    def _globals(self, T: int) -> Tensor:
        """Which of T tokens see all."""
        block, c = torch.arange(T, device=self._activations()[1]) // self.config.block, self.config
        return (block < c.n_global) | (block >= -(-T // c.block) - c.n_global)

    def _by_key_heads(self, q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor]) -> Float[Tensor, "B T H K"]:
        """Every key head and its queries with its own set."""
        index_sets = self.index_sets(-(-q.shape[1] // self.config.block))
        lines = zip(q.chunk(len(index_sets), 2), k.split(1, 2), v.split(1, 2), strict=True)
        return torch.cat([attend(*line, s) for line, s in zip(lines, index_sets)], 2)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.step(x, self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """As prefill, in a cache that has room already: init_state(B, max_len), or reserve."""
        if not self.config.causal:
            raise InputError("bigbird with causal false reads whole sequences: call forward, or set causal true")

        def by_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._by_key_heads(q, k, v, lambda q, k, v, s: sparse_attention(q, k, v, s, state.length))

        o, state = read_all(self.qkv, x, state, lengths, by_position)
        return self.o_proj(o.flatten(2)), state

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv.reference(x)
        causal = self.config.causal
        o = self._by_key_heads(q, k, v, lambda q, k, v, s: sparse_reference(q, k, v, s, causal))
        if not causal:
            o = torch.where(self._globals(x.shape[1])[:, None, None], softmax_reference(q, k, v, causal=False), o)
        return self.o_proj(o.flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        heads = self.qkv.n_heads // self.qkv.n_kv_heads
        index_sets = self.index_sets(-(-T // self.config.block))
        return sum(sparse_attention_flops(T, B, heads, self.qkv.head_dim, s, mode) for s in index_sets)


def _spread(rows: Float[Tensor, "B n H K"], where: Tensor) -> Float[Tensor, "B T H K"]:
    """Rows put where they belong, of T."""
    return rows[:, (where.cumsum(0) - 1).clamp(min=0)] if rows.shape[1] else rows.new_zeros(1, len(where), 1, 1)
