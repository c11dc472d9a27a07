r"""Mixture of block attention (MoBA): every head of every token reads its own block and the few before it that look most alike.

    o_t = sum_{s<=t, block(s) in C(t)} softmax_s(q_t . k_s / sqrt(K)) v_s        block(s) = floor(s / L)

    C(t) = {block(t)}  and the top_k - 1 blocks i < block(t) of largest q_t . mean_{block(s) = i} k_s

Blocks are ranked by what they hold on average, with no parameters: weights are those of attention, which may be swapped for
it before, during or after training. All keys and values are kept; what is saved is reading them. Decoding chooses blocks
too, where the paper reads everything. conv_size gives keys their neighbours, by which blocks are told apart better (Xiao et
al. 2025, arXiv:2511.11571). Ranking all blocks costs T^2 / L small products.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.ops.attention import write_cache
from slipstream.ops.chosen_attention import (
    block_sums,
    blocks_flops,
    chosen_blocks,
    gathered_flops,
    gathered_tokens,
    nearest_blocks,
    nearest_flops,
    tokens_of,
)


class MoBA(Mixer, name="moba", family="sparse"):
    paper = "Lu et al. 2025, arXiv:2502.13189"
    use_when = "attention's own weights must do with a fixed amount of reading a token, at any distance"
    writes, erases = "k and v, beside all others; k to the mean of its block", "nothing"
    decays, reads = "nothing", "softmax(K q)^T V over top_k blocks"
    train_order, decode_order = "T^2", "T"
    symbols = {"B": "block_size", "k": "top_k", "N": "T", "s_i": "q . mean(k)"}
    oracle = "the authors' naive form, rewritten in numpy, tests/oracles/chosen_attention.npz"

    class Config(GroupedConfig):
        block_size: int = Field(64, ge=1)  # tokens that are chosen together
        top_k: int = Field(4, ge=1)  # blocks that a head reads, its own included

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, conv_size=3, block_size=4, top_k=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.qkv = GroupedQKV(config)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        dims = (0, self.qkv.n_kv_heads, self.qkv.head_dim)
        cache = Slot(dims, dtype=None, grows=True)
        return {
            "k": cache,
            "v": cache,
            "k_sum": Slot(dims, grows=True, every=self.config.block_size),
            **self.qkv.slots(),
        }

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        past, L = state.length, self.config.block_size
        q, chosen, slots = self._choose(x, self.reserve(state, x.shape[1]), lengths)
        o = chosen_blocks(q, slots["k"], slots["v"], chosen, past, L)
        return self.o_proj(o.flatten(2)), state.advance(x.shape[1] if lengths is None else lengths, **slots)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        q, chosen, slots = self._choose(x, state, None)
        tokens = tokens_of(chosen, self.config.block_size, state.length[:, None])
        o = gathered_tokens(q, slots["k"], slots["v"], tokens)
        return self.o_proj(o.flatten(2)), state.advance(1, **slots)

    def _choose(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Queries, the blocks they read, and the new slots."""
        (q, k, v, slots), past, L = self.qkv(x, state, lengths), state.length, self.config.block_size
        slots |= {n: write_cache(state[n], t, past, lengths) for n, t in (("k", k), ("v", v))}
        slots["k_sum"] = block_sums(state["k_sum"], k.detach(), past, L, lengths)
        return q, nearest_blocks(q, slots["k_sum"], past, L, self.config.top_k), slots

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv.reference(x)
        L, groups = self.config.block_size, self.qkv.n_heads // self.qkv.n_kv_heads
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        outputs = []
        for t in range(x.shape[1]):
            own = t // L
            means = k[:, : own * L].unflatten(1, (own, L)).mean(2)
            ranked = torch.einsum("bhk,bnhk->bhn", q[:, t], means).argsort(dim=-1, descending=True, stable=True)
            chosen = torch.cat([ranked[..., : self.config.top_k - 1], ranked.new_full((*ranked.shape[:2], 1), own)], -1)
            met = (torch.arange(t + 1) // L == chosen[..., None]).any(2)
            logits = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, : t + 1]) / self.qkv.head_dim**0.5
            weights = logits.masked_fill(~met, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("bhs,bshv->bhv", weights, v[:, : t + 1]))
        return self.o_proj(torch.stack(outputs, 1).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        H, K, L, n = self.qkv.n_heads, self.qkv.head_dim, self.config.block_size, self.config.top_k
        ranking = nearest_flops(T, B, H, K, L, mode)
        if mode == "step":
            return ranking + gathered_flops(B, H, K, K, n * L)
        return ranking + blocks_flops(T, B, H, K, K, H, n, L)
