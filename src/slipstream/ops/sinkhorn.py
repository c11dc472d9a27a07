r"""Causal Sinkhorn balancing: rows come one after another, and each is balanced with the rows before it, never with later ones.

    L <- L_ij - log sum_{i' <= i} e^{L_i'j}        L <- L_ij - log sum_{j' seen by i} e^{L_ij'}        n times, from the scores

Columns first, over the rows so far, then the row itself, so that every row of e^L is a mean over what it sees: what earlier
rows took of a column is less for the later ones. The balancing of Tay et al. 2020 (arXiv:2002.11296) masks what lies above
the diagonal but sums columns over all rows below it, which later rows change. What goes on from one call to the next is, for
each iteration and column, the logarithm of what rows took so far.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NOTHING = -1e30  # the logarithm of no weight: finite, so that differences and gradients are


def causal_sinkhorn(
    scores: Float[Tensor, "B H M N"], seen: Bool[Tensor, "B #H M N"], taken: Float[Tensor, "B H I N"]
) -> tuple[Float[Tensor, "B H M N"], Float[Tensor, "B H I N"]]:
    """Weights of M new rows over the columns they see (zero elsewhere), and what is taken after them, in I iterations.

    A row that sees nothing (one of padding) takes nothing. taken begins at NOTHING.
    """
    log_weights, after = scores.masked_fill(~seen, NOTHING), []
    for before in taken.unbind(2):
        so_far = torch.cat([before[:, :, None], log_weights], 2).logcumsumexp(2)
        after.append(so_far[:, :, -1])
        log_weights = (log_weights - so_far[:, :, 1:]).masked_fill(~seen, NOTHING)
        log_weights = log_weights.log_softmax(3).masked_fill(~seen, NOTHING) if seen.shape[3] else log_weights
    return log_weights.exp().masked_fill(~seen, 0), torch.stack(after, 2)


def reference(scores: Float[Tensor, "B H N N"], n_iterations: int) -> Float[Tensor, "B H N N"]:
    """The definition, entry by entry: row i sees the columns before i."""
    N = scores.shape[2]
    rows = [[scores[:, :, i, j] for j in range(i)] for i in range(N)]
    for _ in range(n_iterations):
        rows = [[rows[i][j] - _log_sum([rows[m][j] for m in range(j + 1, i + 1)]) for j in range(i)] for i in range(N)]
        rows = [[entry - _log_sum(row) for entry in row] for row in rows]
    none = torch.zeros_like(scores[:, :, 0, 0])
    return torch.stack([torch.stack([e.exp() for e in row] + [none] * (N - len(row)), -1) for row in rows], -2)


def _log_sum(entries: list[Tensor]) -> Tensor:
    return torch.stack(entries).logsumexp(0)
