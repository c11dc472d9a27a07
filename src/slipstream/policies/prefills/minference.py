r"""MInference: every head reads in the shape that keeps most of its attention, for the same number of pairs.

    a-shape          the first tokens and the last before a query
    vertical-slash   columns and distances of largest sums of softmax(Q_last K^T / sqrt(K)), Q_last the last 64 queries
    block-sparse     for a block of queries, the blocks of keys of largest mean(Q_block) . mean(K_block)

The authors find the shape of a head beforehand, on one sample, by what the output loses (kernel-aware search, algorithm 1),
and their budgets are fixed numbers of tokens. Here there is nothing to store: the shape is chosen for each prompt, by the
share of attention that 64 queries spread over it keep, and the budget is a share of all causal pairs. A head may also be
vertical-slash in three mixtures, as in their search space. Distances are read as whole blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from slipstream.ops.attention import attention
from slipstream.ops.softmax import Softmax
from slipstream.policies.prompt import BlockPrefill, Choice, Prompt, largest, share_of_one

QUERIES = 64  # that estimate, and as many that judge
FIRST = 30  # columns that are always among the chosen ones
GLOBAL = 0.2  # share of an a-shape that stands at the start: 1024 of 1024 + 4096 tokens
COLUMNS = (0.2, 0.5, 0.8)  # shares of columns in the mixtures of vertical and slash


class MInference(BlockPrefill, name="minference"):
    paper = "Jiang et al. 2024, arXiv:2407.02490, section 3 and algorithms 2 and 3"
    takes = "density: the share of all causal pairs that is read, 0 to 1; 0.2"

    def __init__(self, density: float, block_size: int = 64) -> None:
        self.density, self.block_size = density, block_size

    @classmethod
    def read_argument(cls, argument: str | None, causal: bool) -> MInference:
        return cls(share_of_one("minference", argument, 0.2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: Tensor, lengths: Tensor | None, softmax: Softmax) -> Tensor:
        if self.density == 1:
            return attention(q, k, v, past, softmax=softmax)
        return super().attend(q, k, v, past, lengths, softmax)

    def choose(self, prompt: Prompt) -> Choice:
        judges = prompt.spread(QUERIES)
        weights = prompt.weights(judges)
        best, *others = self.shapes(prompt)
        most = _kept(prompt, weights, judges, best)
        for shape in others:
            kept = _kept(prompt, weights, judges, shape)
            better = kept > most
            best = _Shape(
                torch.where(better[..., None, None], shape.blocks, best.blocks),
                torch.where(better[..., None], shape.columns, best.columns),
            )
            most = torch.where(better, kept, most)
        return Choice(*best)

    def shapes(self, prompt: Prompt) -> list[_Shape]:
        """Each for all heads, with so many keys a query that the share of pairs is as promised."""
        keys = self.density * (prompt.past + (prompt.lengths + 1) / 2)
        last = prompt.last(QUERIES)
        weights = prompt.weights(last)
        column, distance = weights.sum(2), prompt.slashes(weights, last)
        column[..., :FIRST], distance[..., :2] = torch.inf, torch.inf
        lines = [self._lines(prompt, column, distance, keys, share) for share in COLUMNS]
        return [self._a_shape(prompt, column, distance, keys), *lines, self._blocks(prompt, keys)]

    def _a_shape(self, prompt: Prompt, column: Tensor, distance: Tensor, keys: Float[Tensor, "B"]) -> _Shape:
        """The same as lines that always are the first ones and the nearest."""
        first, near = (-torch.arange(x.shape[2], device=x.device).expand_as(x) for x in (column, distance))
        return self._lines(prompt, first, near, keys, GLOBAL)

    def _lines(
        self,
        prompt: Prompt,
        column: Shaped[Tensor, "B H L"],
        distance: Shaped[Tensor, "B H M"],
        keys: Float[Tensor, "B"],
        share: float,
    ) -> _Shape:
        """The largest columns for a share of the keys, the largest distances for the others."""
        many, far = share * keys, ((1 - share) * keys / self.block_size).clamp(min=1)
        blocks = prompt.back(largest(distance, far.long()[:, None]))
        return _Shape(blocks, largest(column, many.long()[:, None]))

    def _blocks(self, prompt: Prompt, keys: Float[Tensor, "B"]) -> _Shape:
        itself = torch.arange(prompt.n_blocks, device=keys.device) == prompt.own[..., None]
        alike = prompt.blocks_alike().masked_fill(itself[:, None], torch.inf)
        blocks = largest(alike, (keys / self.block_size).clamp(min=1).long()[:, None, None]) & prompt.seen()
        return _Shape(blocks, blocks.new_zeros(*blocks.shape[:2], prompt.k.shape[1]))


class _Shape(NamedTuple):
    blocks: Bool[Tensor, "B H N M"]
    columns: Bool[Tensor, "B H L"]


def _kept(
    prompt: Prompt, weights: Float[Tensor, "B H n L"], judges: Int[Tensor, "B n"], shape: _Shape
) -> Float[Tensor, "B H"]:
    """How much of the judges' attention falls on what the shape reads."""
    block = (prompt.past[:, None] + judges.clamp(min=0)) // prompt.block_size
    index = (block - prompt.own[:, :1])[:, None, :, None].expand(-1, shape.blocks.shape[1], -1, prompt.n_blocks)
    itself = torch.arange(prompt.n_blocks, device=block.device) == block[..., None]
    read = shape.blocks.gather(2, index) | itself[:, None]
    columns = prompt.by_blocks(weights * shape.columns[:, :, None])
    return torch.where(read, prompt.by_blocks(weights), columns).sum((-2, -1))
