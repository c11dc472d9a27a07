r"""XAttention: blocks of keys are weighed by sums along antidiagonals; the fewest are read that hold a share of the weight.

    A = softmax_j(sum_{c<S} q_{iS+S-1-c} . k_{jS+c} / (S sqrt(K)))        over the cells j <= i of S x S pairs
    blocks of t: the fewest whose sums of A hold tau of all of it, the first block and its own always among them

An antidiagonal crosses columns and slashes of a cell, so that neither is missed, at 1 / S of all products. Being a mean of S
logits it dilutes what stands alone: a single column counts less than a cell that is high all over; and since S is even, its
pairs are an odd number of tokens apart, so that a slash one token wide at an even distance is not seen.
The thresholds of single heads that the paper can search beforehand (section 2.3) are not here: tau is one for all.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from slipstream.policies.prompt import BlockPrefill, Choice, Prompt, share_of_one, smallest_set

CELLS = 2**22  # pairs of cells that are weighed at once


class XAttention(BlockPrefill, name="xattention"):
    paper = "Xu et al. 2025, arXiv:2503.16428, algorithm 1"
    takes = "tau: the share of the estimated attention that a block of queries keeps, 0 to 1; 0.9"

    def __init__(self, tau: float, block_size: int = 128, stride: int = 16) -> None:
        self.tau, self.block_size, self.stride = tau, block_size, stride

    @classmethod
    def read_argument(cls, argument: str | None, causal: bool) -> XAttention:
        return cls(share_of_one("xattention", argument, 0.9))

    def choose(self, prompt: Prompt) -> Choice:
        """Blocks of queries are weighed a few at a time."""
        B, N, _, H, _ = prompt.q_blocks.shape
        few = max(1, CELLS * self.stride**2 // (B * H * self.block_size * prompt.k.shape[1]))
        weights = torch.cat([self._weights(prompt, slice(i, i + few)) for i in range(0, N, few)], 2)
        block = torch.arange(prompt.n_blocks, device=prompt.past.device)
        always = (block == 0) | (block == prompt.own[..., None])
        return Choice(smallest_set(weights, self.tau, always[:, None]) & prompt.seen())

    def _weights(self, prompt: Prompt, some: slice) -> Float[Tensor, "B H n M"]:
        """How much some blocks of queries attend to blocks of keys, as their antidiagonals say."""
        own, q, S = prompt.own[:, some], prompt.q_blocks[:, some], self.stride
        in_block = torch.arange(self.block_size // S, device=own.device)
        cell = (own[..., None] * len(in_block) + in_block).flatten(1)  # of the queries, counted over the row
        q = q.flatten(1, 2).unflatten(1, (-1, S)).flip(2).transpose(2, 3).flatten(3)
        k = prompt.k.unflatten(1, (-1, S)).transpose(2, 3).flatten(3)
        logits = prompt.logits(q / S, k)
        seen = torch.arange(k.shape[1], device=own.device) <= cell[..., None]
        weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        asking = (cell * S < prompt.ends[:, None]) & ((cell + 1) * S > prompt.past[:, None])
        weights = torch.where(asking[:, None, :, None], weights, 0)
        return weights.unflatten(3, (prompt.n_blocks, -1)).sum(-1).unflatten(2, (own.shape[1], -1)).sum(3)
