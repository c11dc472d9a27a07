r"""Compressed sparse attention (DeepSeek-V4's CSA): a window as it is, and the top_k keys of m tokens each that an indexer finds.

    o_t = sum_{s in W(t) + C(t)} e^{q_t . c_s / sqrt(K)} c_s / (e^{sink} + sum_s e^{q_t . c_s / sqrt(K)})

    c_s = rope(norm(W_kv x_s)) in the window W(t) = {t - w < s <= t}
    c_i = rope(norm(sum_j softmax_j(z_j + e_j) * u_j)) over the 2 m tokens up to i m + m - 1, with weights of their own for
          the first m and the last m
    C(t) = top_k of I_ti = sum_h w_t^h relu(a_t^h . b_i) where (i + 1) m <= t + 1        b_i made as c_i, of other weights

    L = mean_t KL(P_ti || softmax_i(I_ti / sqrt(d)))        d: width of all a_t^h
    P_ti: what all heads together give to c_i, of what they give to all c_i seen, where all of these are read

One head of keys, which are the values too, serves all heads of queries; their outputs are turned back by their own position.
What is chosen has no gradient: the indexer learns by L alone, and nothing else does; who trains opens core/auxiliary.py. The
report on V4 gives no loss of its own: L is that of DSA's warm-up (DeepSeek-V3.2) with compressed keys for tokens. Up to m top_k
tokens nothing is left out. DeepSeek's grouped output projection is one product here, and its YaRN is not here.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.auxiliary import teach
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.compressed_kv import CompressedConfig, Compressor, SharedKVHeads, turn_last
from slipstream.layers.linear import Linear
from slipstream.ops.choice_loss import choice_loss
from slipstream.ops.chosen_attention import index_scores, indexed_flops, indexed_tokens
from slipstream.ops.compressed_attention import (
    QUERIES,
    weights_of_summaries,
    window_and_summaries,
    window_and_summaries_flops,
)
from slipstream.ops.valid import last_tokens, real_tokens, zero_padding


class Indexer(nn.Module):
    """What compressed keys are ranked by: queries, their weights, and keys of its own."""

    def __init__(self, d_model: int, width: int, n_heads: int, head_dim: int, rate: int, of: SharedKVHeads) -> None:
        super().__init__()
        self.n_heads, self.turned, self.base = n_heads, min(of.turned, head_dim // 2 * 2), of.base
        self.compressor = Compressor(d_model, head_dim, rate, True, self.turned, self.base)
        self.q_b_proj = Linear(width, n_heads * head_dim, bias=False)
        self.weights_proj = Linear(d_model, n_heads, bias=False)

    def queries(self, low: Float[Tensor, "B T Q"], positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T I K"]:
        return turn_last(self.q_b_proj(low).unflatten(-1, (self.n_heads, -1)), positions, self.turned, self.base)


class CSA(Mixer, name="csa", family="sparse"):
    paper = "DeepSeek-AI 2026 (DeepSeek-V4), sec. 2.3.1; as in transformers"
    use_when = "very long texts at a small part of attention's memory and reading, with places found again by content"
    writes, erases = "c_s to the window; c_i and b_i, every m tokens", "nothing"
    decays, reads = (
        "what leaves the window, all at once, into its outline",
        "softmax([C_W; C_top_k] q)^T [C_W; C_top_k]",
    )
    train_order, decode_order = "T^2", "T"
    symbols = {"m": "rate", "k": "top_k", "n_win": "window", "n^I_h": "index_n_heads", "c^I": "index_head_dim"}
    oracle = "transformers DeepseekV4Attention, tests/oracles/test_chosen_attention_oracles.py"
    no_weight_decay = ("sinks",)
    no_gradient = ("indexer",)

    class Config(CompressedConfig):
        rate: int = Field(4, ge=1)  # tokens that become one key
        top_k: int = Field(64, ge=1)  # of these keys that are read (DeepSeek-V4: 512)
        index_n_heads: int = Field(4, ge=1)  # heads of the indexer
        index_head_dim: int = Field(32, ge=2)  # width of one (128)
        index_loss: float = Field(1.0, ge=0)  # weight of L, which moves the indexer alone: as in DeepSeek-V3.2

    config: Config
    tiny = Config(
        d_model=16, n_heads=2, q_rank=7, rope_head_dim=4, window=5,
        rate=2, top_k=4, index_n_heads=2, index_head_dim=4, index_loss=1.0,
    )  # fmt: skip

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, self.heads = config, SharedKVHeads(config)
        self.compressor = Compressor(c.d_model, self.heads.head_dim, c.rate, True, self.heads.turned, c.rope_base)
        index = c.q_rank or c.d_model, c.index_n_heads, c.index_head_dim, c.rate
        self.indexer = Indexer(c.d_model, *index, self.heads)

    def slots(self) -> dict[str, Slot]:
        c, K = self.config, self.heads.head_dim
        widths = {"entries": K, "index_entries": c.index_head_dim}
        entries = {n: Slot((0, 1, width), dtype=None, grows=True, every=c.rate) for n, width in widths.items()}
        index = {f"index_{n}": slot for n, slot in self.indexer.compressor.slots().items()}
        return {"near": Slot((c.window - 1, 1, K), dtype=None), **entries, **self.compressor.slots(), **index}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        state = self.reserve(state, x.shape[1])
        y, new, met = self._read(x, state, lengths)
        teach(self, self.config.index_loss, partial(self.lesson, x, met, state, lengths))
        return y, new

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        return self._read(x, state, None)[:2]

    def _read(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State, tuple[Tensor, ...]]:
        """Also what met: queries, the window's line, and compressed keys."""
        past, c = state.length, self.config
        positions = past[:, None] + torch.arange(x.shape[1], device=x.device)
        low = self.heads.low_rank(x)
        line = torch.cat([state["near"], zero_padding(self.heads.keys(x, positions), lengths)], 1)
        slots = self.compressor(x, state.slots, past, lengths) | {"near": last_tokens(line, c.window - 1, lengths)}
        chosen, index = self._choose(x, low, positions, state, lengths)
        q, softmax = self.heads.queries(low, positions), self.heads.softmax
        o = window_and_summaries(q, line, slots["entries"], past, c.window, c.rate, chosen, softmax)
        new = state.advance(x.shape[1] if lengths is None else lengths, **slots, **index)
        return self.heads.output(o, positions), new, (q, line, slots["entries"])

    @torch.no_grad()
    def _choose(self, x: Tensor, low: Tensor, positions: Tensor, state: State, lengths: Tensor | None):
        """Which compressed keys each token reads, and the indexer's slots."""
        before = {n: state[f"index_{n}"] for n in ("kv", "gate", "entries")}
        slots = self.indexer.compressor(x, before, state.length, lengths)
        a, w, b = self.indexer.queries(low, positions), self.indexer.weights_proj(x), slots["entries"][:, :, 0]
        chosen = indexed_tokens(a, w, b, state.length, self.config.top_k, self.config.rate)
        return chosen, {f"index_{n}": t for n, t in slots.items()}

    def lesson(self, x: Tensor, met: tuple[Tensor, ...], state: State, lengths: Tensor | None):
        """The sum of L over so many tokens; its gradient reaches the indexer and nothing else."""
        index, past = self.indexer, state.length
        x, q, *keys = (t.detach().to(index.weights_proj.weight.dtype) for t in (x, *met))
        x, q = (zero_padding(t, lengths) for t in (x, q))
        with torch.no_grad():
            low = self.heads.low_rank(x)
        positions = past[:, None] + torch.arange(x.shape[1], device=x.device)
        before = {n: state[f"index_{n}"] for n in ("kv", "gate", "entries")}
        b = index.compressor(x, before, past, lengths)["entries"][:, :, 0]
        a, w = index.queries(low, positions), index.weights_proj(x)
        near = self.config.window + 2 * QUERIES  # so that a tile of queries is no longer than that, about
        held = near * self.heads.n_heads + b.shape[1] * (self.heads.n_heads + index.n_heads)
        rows = positions, q, a, w
        return choice_loss(self._tile, real_tokens(x, lengths), rows, (*keys, b, past), len(x) * held)

    def _tile(
        self, positions: Tensor, q: Tensor, a: Tensor, w: Tensor, line: Tensor, entries: Tensor, b: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, c = (int(positions.max()) + 1) // self.config.rate, self.config
        what = q, positions, line, entries[:, :n], past, c.window, c.rate, self.heads.softmax
        read_by_heads, seen = weights_of_summaries(*what)
        scores = index_scores(a, w, b[:, :n]) * (a.shape[2] * a.shape[3]) ** -0.5
        return read_by_heads.sum(1, keepdim=True), scores[:, None], seen

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        positions, c = torch.arange(x.shape[1]).expand(len(x), -1), self.config
        low = self.heads.low_rank(x)
        a, w, b = (
            self.indexer.queries(low, positions),
            self.indexer.weights_proj(x),
            self.indexer.compressor.reference(x),
        )
        met = []
        for t in range(x.shape[1]):
            products = torch.einsum("bik,bnk->bin", a[:, t], b[:, : (t + 1) // c.rate, 0]).relu()
            scores = torch.einsum("bi,bin->bn", w[:, t], products)
            met.append(scores.argsort(dim=1, descending=True, stable=True)[:, : c.top_k])
        q, keys = self.heads.queries(low, positions), self.heads.keys(x, positions)
        return self.heads.output(self.heads.reference(q, keys, self.compressor.reference(x), c.window, met), positions)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        c, H, K = self.config, self.heads.n_heads, self.heads.head_dim
        index = indexed_flops(T, B, c.index_n_heads, c.index_head_dim, mode, c.rate)
        return index + window_and_summaries_flops(T, B, H, K, c.window, c.rate, mode, c.top_k)
