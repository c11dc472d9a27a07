r"""Memorizing Transformer: attention to the last W tokens, and to the few nearest keys of all that came before them.

    N(t) = the n of {s <= t - W} with the largest q_t . k_s        o^m_t = sum_{s in N(t)} softmax_s(c q_t . k_s) v_s

    o_t = g o^m_t + (1 - g) o^w_t        g = sigmoid(b), a number a head        q, k of unit length, c a number a head

o^w is attention to the last W tokens with the same q and k, turned by rotary positions; memories have no positions. The
search is exact where the paper's is approximate, and finds the earliest of equals. Where nothing lies beyond the window,
o_t = o^w_t (in the authors' code it is (1 - g) o^w_t). The paper's memory holds what earlier training steps computed, with no
gradient, and so far more than one sequence; here it is the sequence itself, the gradient flows into what was found, and the
choice has none. Keys of unit length, learnt scales and the start b = 0 are those of the authors' code (google-research/meliad).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.buckets import chosen_heads
from slipstream.layers.linear import Linear
from slipstream.layers.rope import rope
from slipstream.ops.attention import attention_flops, window_attention, write_cache
from slipstream.ops.chosen_attention import choose, gathered_flops, gathered_tokens
from slipstream.ops.l2_norm import l2_norm
from slipstream.ops.places import cut_out
from slipstream.ops.recompute import recomputed
from slipstream.ops.softmax import Softmax

SCORES = 2**20  # of queries against all keys, held at once
QUERIES = 256  # whose memories are gathered at once


class MemorizingTransformer(Mixer, name="memorizing_transformer", family="sparse"):
    paper = "Wu et al. 2022, arXiv:2203.08913, sec. 3"
    use_when = "names and definitions from far back must be found again, and everything else is nearby"
    writes, erases = "k and v, beside all others", "nothing"
    decays, reads = "nothing", "g softmax(K_N q)^T V_N + (1 - g) softmax(K_W q)^T V_W"
    train_order, decode_order = "T^2", "T"
    symbols = {"k": "top_k", "g": "sigmoid(gate)", "b_g": "gate", "c": "attention_scale"}
    oracle = "the printed equations with T x T scores in numpy, tests/oracles/bucket_attention.npz"
    no_weight_decay = ("gate", "attention_scale")

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        window: int = Field(256, ge=1)  # tokens seen at any rate, the current one included
        top_k: int = Field(32, ge=1)  # memories found beyond them
        rope_base: float | None = 10000.0  # base of the rotary positions in the window; None for no positions (NoPE)

    config: Config
    tiny = Config(d_model=16, n_heads=2, window=4, top_k=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads, D = heads(config.d_model, config.n_heads), config.d_model
        self.head_dim = D // self.n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(D, D, bias=False) for _ in range(4))
        self.gate = nn.Parameter(torch.zeros(self.n_heads))
        self.attention_scale = nn.Parameter(torch.full((self.n_heads,), self.head_dim**0.5))

    def slots(self) -> dict[str, Slot]:
        dims = (0, self.n_heads, self.head_dim)
        return {
            "k": Slot(dims, grows=True),
            "v": Slot(dims, dtype=None, grows=True),
        }  # who is found hangs on keys: wide

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.step(x, self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """As prefill, in a cache that has room already: init_state(B, max_len), or reserve."""
        q, k, v = self._heads(x)
        k, v = (write_cache(state[n], new, state.length, lengths) for n, new in (("k", k), ("v", v)))
        found = self._found(q, k, state.length)
        remembered = self._remembered(q, k, v.to(k.dtype), found).to(x.dtype)
        g = self.gate.sigmoid()[:, None] * (found[..., :1] >= 0)  # nothing found: nothing to mix in
        o = g * remembered + (1 - g) * self._nearby(q, k, v, state.length)
        return self.o_proj(o.flatten(2)), state.advance(x.shape[1] if lengths is None else lengths, k=k, v=v)

    def _heads(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (l2_norm(chosen_heads(proj, x, self.n_heads)) for proj in (self.q_proj, self.k_proj))
        return q * self.attention_scale[:, None].to(q.dtype), k, self.v_proj(x).unflatten(-1, (self.n_heads, -1))

    def _nearby(self, q: Tensor, k: Tensor, v: Tensor, past: Int[Tensor, "B"]) -> Float[Tensor, "B T H V"]:
        """Attention to the window, whose keys are turned as they are read."""
        reach, base, T = self.config.window - 1, self.config.rope_base, q.shape[1]
        q, k, v = q.to(v.dtype), *(cut_out(t, past - reach, reach + T).to(v.dtype) for t in (k, v))
        if base:
            positions = past[:, None] + torch.arange(-reach, T, device=q.device)
            q, k = rope(q, positions[:, reach:], base), rope(k, positions, base)
        return window_attention(q, k, v, past, self.config.window, Softmax(1.0))

    @torch.no_grad()
    def _found(self, q: Tensor, k: Tensor, past: Int[Tensor, "B"]) -> Int[Tensor, "B T H n"]:
        """The nearest keys beyond the window, by position; -1 for none."""
        chosen = [torch.zeros(len(q), 0, self.n_heads, self.config.top_k, dtype=torch.long, device=q.device)]
        together = self._together(len(q), k.shape[1])
        for i in reversed(range(0, q.shape[1], together)):  # the largest first, whose memory the others then fit in
            rows, keys = q[:, i : i + together], k
            if not torch.compiler.is_compiling():  # scoring only what is filled costs a synchronisation
                keys = k[:, : max(0, int(past.max()) + i + rows.shape[1] - self.config.window) if len(past) else 0]
            at = past[:, None] + torch.arange(i, i + rows.shape[1], device=q.device)
            seen = torch.arange(keys.shape[1], device=q.device) <= (at - self.config.window)[..., None]
            scores = torch.einsum("bthk,bshk->bths", rows, keys)
            chosen.append(choose(scores, seen[:, :, None], self.config.top_k))
        return torch.cat(chosen[::-1], 1)

    def _together(self, B: int, keys: int) -> int:
        return max(1, SCORES // max(1, B * self.n_heads * keys))

    def _remembered(self, q: Tensor, k: Tensor, v: Tensor, found: Int[Tensor, "B T H n"]) -> Float[Tensor, "B T H V"]:
        outs = [q.new_zeros(len(q), 0, *q.shape[2:])]
        for i in range(0, q.shape[1], QUERIES):
            tile = slice(i, i + QUERIES)
            outs.append(recomputed(gathered_tokens, q[:, tile], k, v, found[:, tile], Softmax(1.0)))
        return torch.cat(outs, 1)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        (q, k, v), W, outs = self._heads(x), self.config.window, []
        g = self.gate.sigmoid()[:, None]
        for t in range(x.shape[1]):
            near = range(max(0, t - W + 1), t + 1)
            turned = self._rotated(torch.cat([q[:, t : t + 1], k[:, near]], 1), [t, *near])
            o = _attend(turned[:, 0], turned[:, 1:], v[:, near])
            if far := range(t - W + 1):
                scores = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, far])
                best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.config.top_k].mT
                keys, values = (u[:, far].gather(1, best[..., None].expand(-1, -1, -1, self.head_dim)) for u in (k, v))
                o = g * _attend(q[:, t], keys, values) + (1 - g) * o
            outs.append(o)
        return self.o_proj(torch.stack(outs, 1).flatten(2))

    def _rotated(self, qk: Float[Tensor, "B N H K"], positions: list[int]) -> Float[Tensor, "B N H K"]:
        base = self.config.rope_base
        return rope(qk, torch.tensor(positions).expand(len(qk), -1), base) if base else qk

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        H, K, W = self.n_heads, self.head_dim, self.config.window
        scored, queries = (max(0, T + 1 - W), B) if mode == "step" else (self._scored(T, B), B * T)
        read = attention_flops(T, B, H, K, mode, W) + gathered_flops(queries, H, K, K, self.config.top_k)
        return 2.0 * B * H * K * scored + read

    def _scored(self, T: int, B: int) -> int:
        """Pairs of T first tokens: each query of a tile with all keys that the last one may see."""
        W, n = self.config.window, self._together(B, T)
        whole, rest = divmod(T, n)
        none = min(W // n, whole)  # tiles that end within the window
        return n * (n * (whole * (whole + 1) - none * (none + 1)) // 2 - W * (whole - none)) + rest * max(0, T - W)


def _attend(
    q: Float[Tensor, "B H K"], k: Float[Tensor, "B N H K"], v: Float[Tensor, "B N H V"]
) -> Float[Tensor, "B H V"]:
    return torch.einsum("bhs,bshv->bhv", torch.einsum("bhk,bshk->bhs", q, k).softmax(-1), v)
