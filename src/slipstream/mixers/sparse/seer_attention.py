r"""SeerAttention: a gate foresees for every token which blocks of the past attention would look at, and only these are read.

    o_t = sum_{s<=t, block(s) in C(t)} softmax_s(rope(q_t) . rope(k_s) / sqrt(K)) v_s        block(s) = floor(s / L)

    C(t) = {block(t)}  and the top_k - 1 blocks i < block(t) of largest g_ti, of those with g_ti >= threshold
    g_t = softmax_{i < block(t)}(a_t . b_i / sqrt(K))        a_t = rope_t(W_a [q_t of all heads of a key head])
    b_i = rope_{iL}(W_b [max k_s, min k_s, mean k_s over the L tokens of i])
    L_gate = mean_t KL(m_ti / sum_i' m_ti' || g_ti)        m_ti = max of P_ts over s in i and over the heads of a key head

The gate of SeerAttention-R: every token asks for itself. The first SeerAttention pools queries by blocks too, so that what a
token reads hangs on later tokens; that does for a prompt at once and is not causal. A gate sees q and k before their
positions, and all heads of a key head read the same blocks. A choice has no gradient: the gate learns by L_gate alone, towards
the weights P of attention to all s <= t, and nothing else does; who trains opens core/auxiliary.py. The authors train it inside
a finished model, with the token's own block, which here needs no choice, among the i. The gate begins as what ranks blocks
well untrained, the mean of the queries with the mean of the keys (MoBA), where theirs begins at random. The authors read
prompts densely; here every token reads by the gate, at any cut.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.auxiliary import teach
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.attn_gate import AttnGate
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.ops.attention import write_cache
from slipstream.ops.choice_loss import choice_loss, weights
from slipstream.ops.chosen_attention import (
    QUERIES,
    blocks_flops,
    choose,
    chosen_blocks,
    gathered_flops,
    gathered_tokens,
    nearest_flops,
    tokens_of,
)
from slipstream.ops.chosen_attention import reference as chosen_reference
from slipstream.ops.valid import real_tokens, zero_padding


class SeerAttention(Mixer, name="seer_attention", family="sparse"):
    paper = "Gao et al. 2024, arXiv:2410.13276; SeerAttention-R: Gao et al. 2025, arXiv:2506.08889, eq. 1"
    use_when = (
        "a trained attention must read less of a long past: only a small gate is distilled, all other weights stay"
    )
    writes, erases = "k and v, beside all others; k to the max, min and mean of its block", "nothing"
    decays, reads = "nothing", "softmax(K q)^T V over top_k blocks"
    train_order, decode_order = "T^2", "T"
    symbols = {"Q_gate": "a", "K_gate": "b", "S": "g", "d_gate": "head_dim", "b": "block_size"}
    oracle = "a numpy form written from the paper and the authors' code, tests/oracles/seer_attention.npz"
    no_gradient = ("attn_gate",)

    class Config(GroupedConfig):
        block_size: int = Field(64, ge=1)  # tokens that are chosen together
        top_k: int = Field(4, ge=1)  # blocks that a key head reads at most, its own included (the budget)
        threshold: float = Field(0.0, ge=0, lt=1)  # share of the gate's weight below which a block is not read
        gate_loss: float = Field(1.0, ge=0)  # weight of L_gate, which moves the gate alone: as the authors'

    config: Config
    tiny = Config(
        d_model=16, n_heads=4, n_kv_heads=2, conv_size=3, block_size=4, top_k=4, threshold=0.0, gate_loss=1.0
    )  # fmt: skip

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.qkv = GroupedQKV(config.model_copy(update={"rope_base": None}))
        if config.rope_base and int(config.rope_fraction * self.qkv.head_dim) % 2:
            raise InputError(
                f"rotary positions turn pairs: head_dim {self.qkv.head_dim} must be even, or rope_base none"
            )
        group = self.qkv.n_heads // self.qkv.n_kv_heads
        places = config.rope_base, config.rope_fraction
        self.attn_gate = AttnGate(self.qkv.n_kv_heads, group, self.qkv.head_dim, config.block_size, *places)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.qkv.n_kv_heads, self.qkv.head_dim), dtype=None, grows=True)
        return {"k": cache, "v": cache, **self.attn_gate.slots(), **self.qkv.slots()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        past, L = state.length, self.config.block_size
        q, positions, slots = self._write(x, self.reserve(state, x.shape[1]), lengths)
        teach(self, self.config.gate_loss, partial(self.lesson, q, positions, slots, lengths))
        a = self._ask(q, positions)
        chosen = [past.new_zeros(len(past), 0, self.qkv.n_kv_heads, self.config.top_k)]
        furthest = int(past.max()) if len(past) else 0
        for i in range(0, x.shape[1], QUERIES):
            rows = a[:, i : i + QUERIES]
            blocks = -(-(furthest + i + rows.shape[1]) // L)
            chosen.append(self._choose(rows, slots["k_gate"][:, :blocks], past + i))
        o = chosen_blocks(self.attn_gate.turn(q, positions), slots["k"], slots["v"], torch.cat(chosen, 1), past, L)
        return self.o_proj(o.flatten(2)), state.advance(x.shape[1] if lengths is None else lengths, **slots)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        q, positions, slots = self._write(x, state, None)
        chosen = self._choose(self._ask(q, positions), slots["k_gate"], state.length)
        tokens = tokens_of(chosen, self.config.block_size, state.length[:, None])
        o = gathered_tokens(self.attn_gate.turn(q, positions), slots["k"], slots["v"], tokens)
        return self.o_proj(o.flatten(2)), state.advance(1, **slots)

    def _write(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Queries before their positions, these, and the new slots."""
        (q, k, v, slots), past, gate = self.qkv(x, state, lengths), state.length, self.attn_gate
        positions = past[:, None] + torch.arange(x.shape[1], device=x.device)
        slots |= gate.write(k.detach(), state, lengths)
        turned = {"k": gate.turn(k, positions), "v": v}
        slots |= {n: write_cache(state[n], t, past, lengths) for n, t in turned.items()}
        return q, positions, slots

    @torch.no_grad()
    def _ask(self, q: Tensor, positions: Tensor) -> Float[Tensor, "B T G K"]:
        return self.attn_gate.ask(q, positions)

    @torch.no_grad()
    def _choose(
        self, a: Float[Tensor, "B T G K"], b: Float[Tensor, "B N G K"], past: Int[Tensor, "B"]
    ) -> Int[Tensor, "B T G n"]:
        own = (past[:, None] + torch.arange(a.shape[1], device=a.device))[..., None, None] // self.config.block_size
        block = torch.arange(b.shape[1], device=a.device)
        wide = torch.promote_types(a.dtype, torch.float32)
        logits = torch.einsum("btgk,bngk->btgn", a.to(wide), b.to(wide)) / self.qkv.head_dim**0.5
        share = logits.masked_fill(block >= own, -torch.inf).softmax(-1)
        seen = (block == own) | (block < own) & (share >= self.config.threshold)
        return choose(logits.masked_fill(block == own, torch.inf), seen, self.config.top_k)

    def lesson(
        self, q: Tensor, positions: Tensor, slots: dict[str, Tensor], lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The sum of L_gate over so many tokens; its gradient reaches the gate and nothing else."""
        k, gate = slots["k"].detach(), self.attn_gate
        q = zero_padding(q.detach(), lengths).to(k.dtype)
        whole = int(positions.max()) // self.config.block_size if positions.numel() else 0
        b = gate.answers(slots["k_most"], slots["k_sum"], whole)
        rows = positions, gate.turn(q, positions), gate.ask(q, positions)
        return choice_loss(self._tile, real_tokens(q, lengths), rows, (k, b), len(q) * k.shape[1] * q.shape[2])

    def _tile(self, positions: Tensor, q: Tensor, a: Tensor, k: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        L, last = self.config.block_size, int(positions.max())
        n = last // L  # blocks before the last query's own
        met = torch.arange(last + 1, device=q.device) <= positions[..., None]
        read_by_heads = weights(q, k[:, : last + 1], met[:, None])[..., : n * L].unflatten(-1, (n, L))
        most = read_by_heads.amax(-1).unflatten(1, (k.shape[2], -1)).amax(2)
        scores = torch.einsum("btgk,bngk->bgtn", a, b[:, :n]) / self.qkv.head_dim**0.5
        seen = torch.arange(n, device=q.device) < (positions // L)[..., None]
        return most, scores, seen[:, None].expand_as(most)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        (q, k, v), gate, c = self.qkv.reference(x), self.attn_gate, self.config
        positions, whole = torch.arange(x.shape[1]).expand(x.shape[0], -1), x.shape[1] // c.block_size
        blocks = k[:, : whole * c.block_size].unflatten(1, (whole, c.block_size))
        pooled = torch.cat([blocks.amax(2), blocks.amin(2), blocks.mean(2)], -1)
        with torch.no_grad():
            a, b = gate.ask(q, positions), gate.answer(pooled, positions[:, :whole])
        chosen = torch.full((*a.shape[:3], c.top_k), -1)
        for t in range(x.shape[1]):
            own = t // c.block_size
            g = (torch.einsum("bgk,bngk->bgn", a[:, t], b[:, :own]) / self.qkv.head_dim**0.5).softmax(-1)
            best = g.argsort(dim=-1, descending=True, stable=True)[..., : c.top_k - 1]
            chosen[:, t, :, : best.shape[-1]] = best.masked_fill(g.gather(-1, best) < c.threshold, -1)
            chosen[:, t, :, -1] = own
        q, k = gate.turn(q, positions), gate.turn(k, positions)
        return self.o_proj(chosen_reference(q, k, v, chosen, c.block_size).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        H, G, K = self.qkv.n_heads, self.qkv.n_kv_heads, self.qkv.head_dim
        L, n = self.config.block_size, self.config.top_k
        before = B * self.attn_gate.flops(1 if mode == "step" else T, H) + nearest_flops(T, B, G, K, L, mode)
        if mode == "step":
            return before + gathered_flops(B, H, K, K, n * L)
        return before + blocks_flops(T, B, H, K, K, G, n, L)
