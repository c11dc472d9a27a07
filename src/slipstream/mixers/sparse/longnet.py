r"""LongNet: dilated attention. The wider the segment, the fewer of its tokens meet; branches of several widths are mixed.

    o_t = sum_i sum_{s in G_i(t)} e^{l_ts} v_s / sum_i sum_{s in G_i(t)} e^{l_ts}        l_ts = q_t . k_s / sqrt(K)
    G_i(t) = {s <= t : floor(s / w_i) = floor(t / w_i), s mod r_i = j mod r_i}  if  t mod r_i = j mod r_i,  else none

Key head j takes the tokens j mod r_i of every r_i, so that heads together look at more of them. Branches are mixed by their
denominators: a key that two branches hold counts twice, as in the paper. With w_i / r_i the same in all branches, far
tokens cost as much as near ones, and memory is sum_i w_i / r_i tokens a head, though the reach is the largest w_i. A token
outside of a branch's choice neither reads nor writes it: give the first branch rate 1, or such tokens read nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.ops.index_sets import Blocks, Dilated
from slipstream.ops.softmax import merge
from slipstream.ops.sparse_attention import read_set, sparse_attention_flops
from slipstream.ops.strides import Strides, n_taken
from slipstream.ops.valid import last_tokens


class LongNet(Mixer, name="longnet", family="sparse"):
    paper = "Ding et al. 2023, arXiv:2307.02486, sec. 2.2 and 2.3"
    use_when = (
        "very long texts, of which the near is wanted whole and the far in ever coarser samples, at a constant cost"
    )
    writes, erases = "k and v, to the branches that take the token", "nothing"
    decays, reads = "a segment, all at once, when the next begins", "softmax(K q)^T V, of all branches"
    symbols = {"w": "segments", "r": "rates"}
    oracle = "a float64 loop over the paper's branches, tests/oracles/sparse_patterns.npz"

    class Config(GroupedConfig):
        segments: tuple[int, ...] = (128, 512, 2048)  # w: tokens of a segment, branch by branch
        rates: tuple[int, ...] = (1, 4, 16)  # r: of so many tokens one is taken; each divides its segment

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, segments=(4, 12, 32), rates=(1, 3, 8))

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.branches = _branches(config)
        self.qkv = GroupedQKV(config)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        found: dict[str, Slot] = {}
        for i, (segment, rate) in enumerate(self.branches):
            line = Slot((segment // rate - 1, self.qkv.n_kv_heads, self.qkv.head_dim), dtype=None)
            found |= {f"k{i}": line, f"v{i}": line}
        return found | self.qkv.slots()

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        q, k, v, kept = self.qkv(x, state, lengths)
        parts = []
        for i, (segment, rate) in enumerate(self.branches):
            taken = Strides(rate, self.qkv.n_kv_heads, state.length, x.shape[1], lengths)
            line_k, line_v = (
                torch.cat([_by_rows(state[f"{n}{i}"]), taken.out_of(x)], 1) for n, x in (("k", k), ("v", v))
            )
            size = segment // rate
            o, lse = read_set(taken.out_of(q), line_k, line_v, Blocks(size), taken.past, taken.past - (size - 1))
            parts.append((taken.back(o, 0.0), taken.back(lse, -torch.inf)))
            for n, line in (("k", line_k), ("v", line_v)):
                kept[f"{n}{i}"] = _by_heads(last_tokens(line, size - 1, taken.lengths), len(state.length))
        o = merge(parts)[0]
        return self.o_proj(o.flatten(2)), state.advance(x.shape[1] if lengths is None else lengths, **kept)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv.reference(x)
        q = q.unflatten(2, (k.shape[2], -1))
        s, outputs = torch.arange(x.shape[1]), []
        for t in s:
            held = [torch.stack([index_set.sees(t, s) & (s <= t) for index_set in sets]) for sets in self._sets()]
            times = torch.stack(held).sum(0)  # in how many branches a key head meets s
            weights = torch.einsum("bgrk,bsgk->bgrs", q[:, t], k).div(q.shape[-1] ** 0.5).exp() * times[:, None]
            total = weights.sum(-1, keepdim=True)
            outputs.append(torch.einsum("bgrs,bsgv->bgrv", weights / torch.where(total > 0, total, 1), v).flatten(1))
        return self.o_proj(torch.stack(outputs, 1))

    def _sets(self) -> Iterator[list[Dilated]]:
        """For each branch and key head, as the equation has it."""
        for segment, rate in self.branches:
            yield [Dilated(segment, rate, j % rate) for j in range(self.qkv.n_kv_heads)]

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        H, K = self.qkv.n_heads, self.qkv.head_dim
        return sum(
            sparse_attention_flops(n_taken(T, rate), B, H, K, Blocks(segment // rate), mode)
            for segment, rate in self.branches
        )


def _branches(config: LongNet.Config) -> list[tuple[int, int]]:
    if len(config.segments) != len(config.rates) or not config.rates:
        raise InputError(f"segments {config.segments} and rates {config.rates} must be as many, at least one")
    for segment, rate in zip(config.segments, config.rates, strict=True):
        if rate < 1 or segment < 1 or segment % rate:
            raise InputError(f"a rate must divide its segment: rate {rate} does not divide segment {segment}")
    return list(zip(config.segments, config.rates, strict=True))


def _by_rows(kept: Float[Tensor, "B n G K"]) -> Float[Tensor, "BG n 1 K"]:
    return kept.transpose(1, 2).flatten(0, 1)[:, :, None]


def _by_heads(line: Float[Tensor, "BG n 1 K"], B: int) -> Float[Tensor, "B n G K"]:
    return line[:, :, 0].unflatten(0, (B, -1)).transpose(1, 2)
