r"""Synthesizer: attention weights without keys, read off each token alone, or off a table that is only learned.

    o_t = sum_{s<=t} softmax_s(A_ts) v_s        y_t = W_o o_t

    dense              A_ts = relu(W_1 x_t) . w_s                factorised_dense   A_ts = a(x_t)_{s mod n} b(x_t)_{s div n}
    random             A_ts = R_ts                               factorised_random  A_ts = (R_1)_t . (R_2)_s

Quadratic in T, like the attention it does without, and no longer than its table: positions are rows and columns of learned
weights, so an input beyond max_len is refused. Nothing is compared with anything, so it cannot look things up by content.
Memory is the values alone. a(x) and b(x) are made as A of dense is, each with a table of its own of about sqrt(max_len)
rows, so this form, the default, stays small; the others grow with max_len, random with its square. The paper's mixtures
with attention, and its biases, are left out.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.attention import write_cache

BLOCK = 512  # tokens whose weights are held at once


class Synthesizer(Mixer, name="synthesizer", family="linear"):
    paper = "Tay, Bahri, Metzler, Juan, Zhao, Zheng 2020, arXiv:2005.00743, sec. 3"
    use_when = "a baseline: how far short sequences get when no token is compared with another"
    train_order, decode_order = "T^2", "T"
    writes, erases = "v, in a row of its own", "nothing"
    decays, reads = "nothing", "softmax_s(A_ts) over all v_s"
    symbols = {"A": "weights before the softmax", "F": "hidden_proj, relu and table", "l": "max_len", "k": "rank"}
    oracle = "the four forms with their T x T matrix in numpy, tests/oracles/slot_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        kind: Literal["dense", "factorised_dense", "random", "factorised_random"] = "factorised_dense"  # form of A
        max_len: int = 16384  # positions that the tables know: no input may be longer
        rank: int = 8  # of a factorised random table

    config: Config
    tiny = Config(d_model=16, n_heads=2, max_len=70)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.head_dim = config.d_model // self.n_heads
        if config.kind.endswith("dense"):
            self.hidden_proj = Linear(config.d_model, config.d_model, bias=False)
        self.tables = nn.ParameterList(torch.randn(self.n_heads, *shape) * std for shape, std in self._shapes())
        self.v_proj = Linear(config.d_model, config.d_model, bias=False)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def _shapes(self) -> list[tuple[tuple[int, int], float]]:
        """Of each table: rows and columns, and the size of its numbers that makes A begin near 1."""
        n, K, rank = self.config.max_len, self.head_dim, self.config.rank
        root = math.isqrt(n - 1) + 1
        return {
            "dense": [((n, K), K**-0.5)],
            "factorised_dense": [((root, K), K**-0.5), ((-(-n // root), K), K**-0.5)],
            "random": [((n, n), 1.0)],
            "factorised_random": [((n, rank), rank**-0.25)] * 2,
        }[self.config.kind]

    def slots(self) -> dict[str, Slot]:
        return {"v": Slot((0, self.n_heads, self.head_dim), dtype=None, grows=True)}

    def init_state(self, batch_size: int, max_len: int = 0) -> State:
        self._check(max_len)
        return super().init_state(batch_size, max_len)

    def reserve(self, state: State, tokens: int) -> State:
        self._check(tokens + (int(state.length.max()) if len(state.length) else 0))
        return super().reserve(state, tokens)

    def _check(self, tokens: int) -> None:
        if tokens > self.config.max_len:
            raise InputError(
                f"synthesizer has tables for {self.config.max_len} tokens, not {tokens}; set max_len={tokens}"
            )

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no cache."""
        self._check(x.shape[1])
        return self._mixed(x, self._values(x), torch.zeros(len(x), dtype=torch.long, device=x.device))

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        state = self.reserve(state, x.shape[1])
        v = write_cache(state["v"], self._values(x), state.length, lengths)
        seen = x.shape[1] + (int(state.length.max()) if len(state.length) else 0)
        return self._mixed(x, v[:, :seen], state.length), state.advance(x.shape[1] if lengths is None else lengths, v=v)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        v = write_cache(state["v"], self._values(x), state.length)
        return self._mixed(x, v[:, : self.config.max_len], state.length), state.advance(1, v=v)

    def _values(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H V"]:
        return self.v_proj(x).unflatten(-1, (self.n_heads, -1))

    def _mixed(self, x: Float[Tensor, "B T D"], v: Float[Tensor, "B S H V"], past: Int[Tensor, "B"]) -> Tensor:
        """Block by block of tokens; those of a block see what any of them may."""
        outs, place = [], past[:, None] + torch.arange(x.shape[1], device=x.device)
        for i in range(0, x.shape[1], BLOCK):
            at, last = place[:, i : i + BLOCK], max(0, x.shape[1] - i - BLOCK)  # later tokens, which none here sees
            values = v[:, : v.shape[1] - last] if x.shape[1] > 1 else v
            future = torch.arange(values.shape[1], device=x.device) > at[:, None, :, None]
            A = self._scores(x[:, i : i + BLOCK], at, values.shape[1]).masked_fill(future, -torch.inf)
            outs.append(torch.einsum("bhts,bshv->bthv", A.softmax(-1), values))
        return self.o_proj((torch.cat(outs, 1) if outs else v[:, :0]).flatten(2))

    def _scores(self, x: Float[Tensor, "B T D"], place: Int[Tensor, "B T"], n: int) -> Float[Tensor, "B H T S"]:
        """A, for the first n columns."""
        first, second = self.tables[0], self.tables[-1]
        if self.config.kind == "random":
            return first[:, place, :n].transpose(0, 1)
        if self.config.kind == "factorised_random":
            return torch.einsum("hbtk,hsk->bhts", first[:, place], second[:, :n])
        hidden = F.relu(self.hidden_proj(x)).unflatten(-1, (self.n_heads, -1))
        if self.config.kind == "dense":
            return torch.einsum("bthk,hsk->bhts", hidden, first[:, :n])
        needed = second[:, : -(-n // first.shape[1])]
        a, b = (torch.einsum("bthk,hsk->bhts", hidden, table) for table in (first, needed))
        return (b[..., :, None] * a[..., None, :]).flatten(-2)[..., :n]

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        v, outs = self._values(x), []
        for t in range(x.shape[1]):
            A = self._scores(x[:, t : t + 1], torch.full((len(x), 1), t), t + 1)[:, :, 0]
            outs.append(torch.einsum("bhs,bshv->bhv", A.softmax(-1), v[:, : t + 1]))
        return self.o_proj(torch.stack(outs, 1).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        ends = range(BLOCK, T + BLOCK, BLOCK)
        blocks = [(1, T + 1)] if mode == "step" else [(BLOCK + min(0, T - end), min(T, end)) for end in ends]
        pairs, K, c = sum(tokens * seen for tokens, seen in blocks), self.head_dim, self.config
        root, most = self.tables[0].shape[1], self.tables[-1].shape[1]
        rows = sum(tokens * (root + min(most, -(-seen // root))) for tokens, seen in blocks)
        scores = {"dense": pairs * K, "factorised_dense": rows * K, "factorised_random": pairs * c.rank}
        return 2.0 * B * self.n_heads * (pairs * K + scores.get(c.kind, 0))
