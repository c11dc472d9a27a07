r"""FlexPrefill: every head of every prompt reads as much as holds a share of its attention, by lines or by blocks.

    A = softmax(Q_last K^T / sqrt(K))        of the last block of queries
    by blocks where d = sqrt(JS(softmax(mean(Q_last) . mean(K_block) / sqrt(K)) || sums of A over blocks)) < 0.1
        the fewest pairs of blocks that hold gamma of softmax(mean(Q_block) . mean(K_block) / sqrt(K))
    by lines otherwise
        the fewest columns, and the fewest distances, that hold gamma of A each: all of both are read

Means of blocks may stand for a head whose last queries they foretell (query-aware); the others follow columns and slashes.
As in the authors' code the first block is always read, and at least 512 tokens' worth of both lines. Columns are single keys
here, where theirs are widened to blocks of them; distances are counted in blocks in both.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.policies.prompt import BlockPrefill, Choice, Prompt, largest, share_of_one, smallest_set

TAU = 0.1  # the distance from which on means of blocks do not foretell attention


class FlexPrefill(BlockPrefill, name="flexprefill"):
    paper = "Lai et al. 2025, arXiv:2502.20766, algorithms 1 to 4"
    takes = "gamma: the share of the estimated attention that a head keeps, 0 to 1; 0.9"

    def __init__(self, gamma: float, block_size: int = 128, least: int = 512) -> None:
        self.gamma, self.block_size, self.least = gamma, block_size, least

    @classmethod
    def read_argument(cls, argument: str | None, causal: bool) -> FlexPrefill:
        return cls(share_of_one("flexprefill", argument, 0.9))

    def choose(self, prompt: Prompt) -> Choice:
        last = prompt.last(self.block_size)
        weights = prompt.weights(last)
        column, distance = weights.sum(2), prompt.slashes(weights, last)
        foretold = self._foretold(prompt, last, prompt.by_blocks(column))
        columns = self._line(column, self.least, foretold)
        distances = self._line(distance, -(-self.least // self.block_size), foretold)
        alike = prompt.blocks_alike()
        pairs = smallest_set(alike.flatten(2), self.gamma).unflatten(2, alike.shape[2:])
        blocks = prompt.back(distances) | pairs & foretold[..., None, None]
        blocks[..., :1] = True
        return Choice(blocks & prompt.seen(), columns)

    def _line(self, x: Float[Tensor, "B H n"], least: int, foretold: Bool[Tensor, "B H"]) -> Bool[Tensor, "B H n"]:
        """The fewest that hold gamma, but not fewer than the least; no more than that where blocks are chosen by their means."""
        enough = smallest_set(x, self.gamma) & ~foretold[..., None]
        return enough | largest(x, torch.full_like(foretold, least, dtype=torch.long))

    def _foretold(self, prompt: Prompt, last: Int[Tensor, "B n"], true: Float[Tensor, "B H M"]) -> Bool[Tensor, "B H"]:
        """Whether the mean of the last queries and of each block of keys foretell how much is attended to in it."""
        first = torch.arange(prompt.n_blocks, device=last.device) * self.block_size
        seen = (first < prompt.ends[:, None].clamp(min=1))[:, None]
        mean = prompt.logits(prompt.mean_of(last), prompt.mean_keys)[:, :, 0].masked_fill(~seen, -torch.inf).softmax(-1)
        true = true / true.sum(-1, keepdim=True).clamp(min=torch.finfo(true.dtype).tiny)
        return _divergence(mean, true).sqrt() < TAU


def _divergence(p: Float[Tensor, "*R n"], q: Float[Tensor, "*R n"]) -> Float[Tensor, "*R"]:
    """Jensen-Shannon's."""
    log_half = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny).log()
    of_p, of_q = ((torch.xlogy(x, x) - x * log_half).sum(-1) for x in (p, q))
    return ((of_p + of_q) / 2).clamp(min=0)
