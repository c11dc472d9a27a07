"""The next token from logits: penalty, temperature, top-k, top-p, min-p, then one draw.

The random number of a draw is a pure function of (seed, position): text that is interrupted and continued, or written
beside other rows of a batch, comes out the same. Source of the filters: top-p arXiv:1904.09751, min-p arXiv:2407.01082,
repetition penalty arXiv:1909.05858 eq. 13.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.generate.config import Sampling


def probabilities(logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"], how: Sampling) -> Float[Tensor, "B V"]:
    """What the next token is drawn from, in float64. seen: tokens that were read or written."""
    logits = logits.double()
    penalty = how.repetition_penalty
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if how.temperature == 0:
        return torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / how.temperature
    if how.top_k is not None:
        least = logits.topk(min(how.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if how.top_p is not None:
        logits = logits.masked_fill(_beyond_top_p(logits, how.top_p), -torch.inf)
    if how.min_p is not None:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < how.min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits.softmax(-1)


def _beyond_top_p(logits: Float[Tensor, "B V"], top_p: float) -> Bool[Tensor, "B V"]:
    """True for tokens before which the likelier ones make up top_p already; the likeliest never is."""
    p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    beyond = p.cumsum(-1) - p >= top_p
    return beyond.scatter(1, order, beyond)


def draw(p: Float[Tensor, "B V"], seeds: list[int], positions: list[int]) -> Int[Tensor, "B"]:
    """One token a row: the first at which the cumulated probability passes the row's random number."""
    u = torch.tensor([uniform(s, t) for s, t in zip(seeds, positions)], dtype=p.dtype, device=p.device)
    upto = p.cumsum(-1)
    return torch.searchsorted(upto, u[:, None] * upto[:, -1:], right=True)[:, 0].clamp(max=p.shape[1] - 1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else (Philox, a counter-based generator)."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position)).random())
