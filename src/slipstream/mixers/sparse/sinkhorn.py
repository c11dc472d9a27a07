r"""Sparse Sinkhorn attention, causal: each block of tokens attends to itself and to one block that is sorted out of the past.

    R_ij = mean(q up to the first token of block i) . mean(k in block j) / (sqrt(K) tau)        S = causal_sinkhorn(R), j < i

    K~_i = sum_{j<i} S_ij K_j        V~_i = sum_{j<i} S_ij V_j        o_t = softmax([K~_i; K_i up to t] q_t)^T [V~_i; V_i]

K_j are the b keys of block j, so that S sorts blocks, softly. What differs from the paper: its sorting network has a weight
for every block position, so that it needs to know the longest sequence; this is the one by products, as in
sinkhorn-transformer on PyPI. Its balancing sums columns over later rows too, so that what a block reads changes with what
follows it; here a row is balanced with the rows before it (ops/sinkhorn.py), and ends as a mean. No Gumbel noise. Positions
are rotary, the sorted block standing where the previous block stands; the paper adds positions to the embeddings.

Sorting costs (T / b)^2 products of blocks, and all keys are kept: far less than attention, but it grows alike.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_lines import add_grouped_lines, grouped_lines
from slipstream.layers.rope import rope
from slipstream.ops.attention import write_cache
from slipstream.ops.places import cut_out
from slipstream.ops.recompute import recomputed
from slipstream.ops.sinkhorn import NOTHING, causal_sinkhorn
from slipstream.ops.sinkhorn import reference as sinkhorn_reference
from slipstream.ops.softmax import read
from slipstream.ops.valid import zero_padding


class Sinkhorn(Mixer, name="sinkhorn", family="sparse"):
    paper = "Tay et al. 2020, arXiv:2002.11296, sec. 3"
    use_when = (
        "local attention is nearly enough, and a summary of the past that each block sorts for itself is to be added"
    )
    writes, erases = "k and v, beside all others", "nothing"
    decays, reads = "nothing", "softmax([K~; K] q)^T [V~; V], K~ = sum_j S_j K_j"
    train_order, decode_order = "T^2", "T"
    symbols = {"b": "block_size", "tau": "temperature", "N_k": "n_iterations", "psi(K)": "K~"}
    oracle = "the printed equations by loops over blocks in numpy, tests/oracles/bucket_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        block_size: int = Field(64, ge=1)  # tokens of a block
        n_iterations: int = Field(5, ge=1)  # of balancing
        temperature: float = Field(0.75, gt=0)  # of the sorting: lower is harder
        rope_base: float | None = 10000.0  # base of the rotary positions; None for no positions (NoPE)

    config: Config
    tiny = Config(d_model=16, n_heads=2, block_size=4, n_iterations=2, temperature=0.75)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads, _, self.head_dim = add_grouped_lines(self, config.n_heads, None)

    def slots(self) -> dict[str, Slot]:
        """taken and sorting (the weights of the block at hand) are by block: they fill the first of as many places as tokens."""
        H, K = self.n_heads, self.head_dim
        cache = Slot((0, H, K), dtype=None, grows=True)
        by_block = {"taken": Slot((0, H, self.config.n_iterations), start=NOTHING, grows=True)}
        return {"k": cache, "v": cache, "q_sum": Slot((H, K)), **by_block, "sorting": Slot((0, H), grows=True)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        state, b, T = self.reserve(state, x.shape[1]), self.config.block_size, x.shape[1]
        offset = state.length % b
        frames = max(1, -(-int((offset + T).max()) // b)) if len(x) else 1
        columns = max(0, int(state.length.max()) + T - 1) // b if len(x) else 0
        q, slots = self._written(x, state, lengths)
        sums = state["q_sum"][:, None] + zero_padding(q, lengths).to(state["q_sum"].dtype).cumsum(1)
        firsts = cut_out(sums, -offset, frames * b)[:, ::b]
        ends = state.length + (T if lengths is None else lengths)
        S, sorting = self._sorting(firsts, ends, columns, state, slots["k"])
        queries = cut_out(q, -offset, frames * b).unflatten(1, (-1, b))
        at = torch.arange(b, device=x.device).expand(len(x), -1)
        o = recomputed(self._read, queries, at, S, slots["k"], slots["v"], state.length // b)
        return self._output(cut_out(o, offset, T)), State({**slots, **sorting}, ends)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """One token, in a cache that has room already: init_state(B, max_len), or reserve."""
        b, block = self.config.block_size, state.length // self.config.block_size
        columns = state["k"].shape[1] // b
        if not torch.compiler.is_compiling():  # what is not filled need not be sorted
            columns = int(block.max()) if len(x) else 0
        q, slots = self._written(x, state, None)
        S, sorting = self._sorting(slots["q_sum"][:, None], state.length + 1, columns, state, slots["k"])
        o = self._read(q[:, None], (state.length % b)[:, None], S, slots["k"], slots["v"], block)
        return self._output(o), State({**slots, **sorting}, state.length + 1)

    def _written(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """q, and the slots with the new keys, values and queries in them."""
        q, k, v = grouped_lines(self, x, self.head_dim)
        slots = {n: write_cache(state[n], new, state.length, lengths) for n, new in (("k", k), ("v", v))}
        q_sum = state["q_sum"] + zero_padding(q, lengths).to(state["q_sum"].dtype).sum(1)
        return q, {**state.slots, **slots, "q_sum": q_sum}

    def _sorting(
        self, firsts: Float[Tensor, "B M H K"], ends: Int[Tensor, "B"], columns: int, state: State, keys: Tensor
    ) -> tuple[Float[Tensor, "B M N H"], dict[str, Tensor]]:
        """The weights of this call's blocks over those before them, and the slots of the sorting.

        firsts: sums of q up to the blocks' first tokens. A block that began before this call has its weights already.
        """
        b, past = self.config.block_size, state.length[:, None]
        block = past // b + torch.arange(firsts.shape[1], device=past.device)
        begins = (block * b >= past) & (block * b < ends[:, None])
        seen = (torch.arange(columns, device=past.device) < block[..., None]) & begins[..., None]
        q = firsts / (block * b + 1)[..., None, None]
        k = _blocks(keys, columns, b).to(q.dtype).mean(2)
        scores = torch.einsum("bmhk,bnhk->bhmn", q, k) * (self.head_dim**-0.5 / self.config.temperature)
        S, taken = causal_sinkhorn(scores, seen[:, None], state["taken"][:, :columns].permute(0, 2, 3, 1))
        S, known = S.permute(0, 2, 3, 1), state["sorting"][:, None, :columns]
        S = torch.cat([torch.where(begins[:, :1, None, None], S[:, :1], known), S[:, 1:]], 1)
        last = ((ends - 1) // b - block[:, 0]).clamp(min=0)
        at_hand = S.gather(1, last[:, None, None, None].expand(-1, -1, *S.shape[2:]))[:, 0]
        fresh = {"taken": taken.permute(0, 3, 1, 2), "sorting": at_hand}
        return S, {n: torch.cat([t, state[n][:, columns:]], 1) for n, t in fresh.items()}

    def _read(
        self,
        q: Float[Tensor, "B M C H K"],
        at: Int[Tensor, "B C"],
        S: Float[Tensor, "B M N H"],
        k: Float[Tensor, "B S H K"],
        v: Float[Tensor, "B S H K"],
        first: Int[Tensor, "B"],
    ) -> Float[Tensor, "B L H K"]:
        """Queries, C of a block at places `at` of it, against the block sorted for theirs and what came before in their own."""
        b, M = self.config.block_size, q.shape[1]
        own = [cut_out(t, first * b, M * b).unflatten(1, (-1, b)) for t in (k, v)]
        mixed = [torch.einsum("bmnh,bnchk->bmchk", S.to(t.dtype), _blocks(t, S.shape[2], b)) for t in (k, v)]
        starts = (first[:, None] + torch.arange(M, device=first.device)) * b
        place = torch.arange(-b, b, device=first.device)
        q = self._turned(q, starts[..., None] + at[:, None])
        k = self._turned(torch.cat([mixed[0], own[0]], 2), starts[..., None] + place)
        mask = (place <= at[:, None, :, None]) & ((place >= 0) | (starts > 0)[..., None, None])
        o = read(
            q.flatten(0, 1),
            k.flatten(0, 1),
            torch.cat([mixed[1], own[1]], 2).flatten(0, 1),
            mask.flatten(0, 1)[:, None],
        )
        return o.unflatten(0, (-1, M)).flatten(1, 2)

    def _turned(self, qk: Float[Tensor, "B M C H K"], positions: Int[Tensor, "B M C"]) -> Float[Tensor, "B M C H K"]:
        if not self.config.rope_base:
            return qk
        return rope(qk.flatten(1, 2), positions.flatten(1), self.config.rope_base).unflatten(1, qk.shape[1:3])

    def _output(self, o: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T D"]:
        return self.get_submodule("o_proj")(o.flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = grouped_lines(self, x, self.head_dim)
        b, outs = self.config.block_size, []
        blocks = [range(i, min(i + b, x.shape[1])) for i in range(0, x.shape[1], b)]
        means = [torch.stack([q[:, : tokens[0] + 1].mean(1) for tokens in blocks], 2)]
        means.append(torch.stack([k[:, tokens[0] : tokens[-1] + 1].mean(1) for tokens in blocks], 2))
        S = sinkhorn_reference(
            means[0] @ means[1].mT * self.head_dim**-0.5 / self.config.temperature, self.config.n_iterations
        )
        for i, tokens in enumerate(blocks):
            past = [[S[:, None, :, i, j, None] * t[:, blocks[j]] for j in range(i)] for t in (k, v)]
            mixed = [[torch.stack(parts).sum(0)] if parts else [] for parts in past]
            for t in tokens:
                keys, values = (torch.cat([*m, u[:, tokens[0] : t + 1]], 1) for m, u in zip(mixed, (k, v)))
                places = torch.arange(t + 1 - keys.shape[1], t + 1).expand(len(x), 1, -1)
                query, keys = self._turned(q[:, None, t : t + 1], places[..., -1:]), self._turned(keys[:, None], places)
                outs.append(read(query[:, 0], keys[:, 0], values))
        return self._output(torch.cat(outs, 1))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        b, K = self.config.block_size, self.head_dim
        frames, columns = (1, T // b) if mode == "step" else (-(-T // b), -(-T // b) - 1)
        queries = 1 if mode == "step" else frames * b
        return 2.0 * B * self.n_heads * K * (frames * columns * (1 + 2 * b) + queries * 4 * b)


def _blocks(cache: Float[Tensor, "B S H K"], columns: int, b: int) -> Float[Tensor, "B N C H K"]:
    return cache[:, : columns * b].unflatten(1, (columns, b))
