r"""What teaches a part that only chooses: how far its scores are from what attention reads, tile by tile of queries.

    L = mean_t KL(p_t || softmax(I_t))        p_ts = m_ts / sum_s' m_ts'        over the s that t may choose

m is what attention weighs, summed (or maximised) over heads by the caller. DeepSeek-AI 2025, arXiv:2512.02556, teaches DSA's
indexer so, first over all tokens, then over the chosen; Gao et al. 2025, arXiv:2506.08889, SeerAttention's gate. The weights
have no gradient, the scores have; queries go tile by tile and are made again for it, so T x T scores are never held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.ops.recompute import recomputed
from slipstream.ops.softmax import PLAIN, Softmax, logits_of

Tile = Callable[..., tuple[Tensor, Tensor, Tensor]]  # masses, scores, and who may be chosen: (B G t S) each
HELD = 2**22  # weights and scores that are held at once


def choice_loss(
    tile: Tile, real: Bool[Tensor, "B T"], rows: Sequence[Tensor], whole: Sequence[Tensor], a_query: int
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The sum over real queries, and how many these are. tile(*rows, *whole) is given its own queries of rows (B T ...).

    a_query: weights and scores that one query of all rows needs held.
    """
    together, total = max(1, HELD // max(1, a_query)), torch.zeros((), device=real.device)
    for i in range(0, real.shape[1] if len(real) else 0, together):
        mine = [x[:, i : i + together] for x in rows]
        total = total + recomputed(_summed, tile, real[:, i : i + together], *mine, *whole)
    return total, real.sum()


def _summed(tile: Tile, real: Bool[Tensor, "B t"], *tensors: Tensor) -> Float[Tensor, ""]:
    found = divergence(*tile(*tensors)).mean(1)  # over groups of heads that choose for themselves
    return torch.where(real, found, 0).sum()


def divergence(
    masses: Float[Tensor, "*B S"], scores: Float[Tensor, "*B S"], seen: Bool[Tensor, "*B S"]
) -> Float[Tensor, "*B"]:
    """KL of the masses, as shares, from the softmax of the scores, over what is seen; nothing where nothing is."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    none = ~seen.any(-1, keepdim=True)
    log_said = scores.to(wide).masked_fill(~(seen | none), -torch.inf).log_softmax(-1).masked_fill(~seen, 0)
    masses = masses.detach().to(wide).masked_fill(~seen, 0)
    shares = masses / masses.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    return (torch.xlogy(shares, shares) - shares * log_said).sum(-1)


@torch.no_grad()
def weights(
    q: Float[Tensor, "B t H K"],
    k: Float[Tensor, "B S G K"],
    met: Bool[Tensor, "B #H t S"],
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "B H t S"]:
    """What each query gives to the keys that it meets, one at least; the sinks have taken their share."""
    logits = logits_of(q, k, softmax).masked_fill(~met, -torch.inf)
    if softmax.sinks is None:
        return logits.softmax(-1)
    sinks = softmax.sinks.to(logits.dtype)[:, None, None].expand(len(q), -1, q.shape[1], 1)
    return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
