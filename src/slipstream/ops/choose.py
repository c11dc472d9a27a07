r"""Other rules by which tokens choose experts than the k largest scores: within few groups, up to a mass, within a capacity.

All give expert numbers (*B k), where the number E stands for none; of equal scores the lower number comes first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.ops.route import best


def in_best_groups(
    scores: Float[Tensor, "*B E"], n_groups: int, top_groups: int, members: int
) -> Float[Tensor, "*B E"]:
    """Scores, -inf outside the top_groups groups of neighbours whose `members` best scores have the largest sum.

    DeepSeek-V2 (arXiv:2405.04434, sec. 2.2.2) counts a group by its best expert, V3 (arXiv:2412.19437, sec. 2.1.2) by its two.
    """
    grouped = scores.unflatten(-1, (n_groups, -1))
    strength = grouped.topk(members, -1).values.sum(-1)
    kept = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, best(strength, top_groups), True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


def up_to_mass(p: Float[Tensor, "*B E"], mass: float, most: int) -> Int[Tensor, "*B k"]:
    """The fewest largest of p whose sum is more than mass: at least one, at most `most`."""
    chosen = best(p, most)
    own = p.gather(-1, chosen)
    before = own.cumsum(-1) - own
    return chosen.masked_fill(before > mass, p.shape[-1])


def above(scores: Float[Tensor, "*B E"], threshold: float, most: int) -> Int[Tensor, "*B k"]:
    """Those above a threshold: none, or at most the `most` largest."""
    chosen = best(scores, most)
    return chosen.masked_fill(scores.gather(-1, chosen) <= threshold, scores.shape[-1])


def of_chosen(scores: Float[Tensor, "*B E"], chosen: Int[Tensor, "*B k"]) -> Float[Tensor, "*B k"]:
    """The scores of the chosen, 0 for none."""
    n_experts = scores.shape[-1]
    return scores.gather(-1, chosen.clamp(max=n_experts - 1)).masked_fill(chosen == n_experts, 0.0)


def within_capacity(
    experts: Int[Tensor, "B T k"], n_experts: int, capacity: int, first: Bool[Tensor, "B T"], counts: Int[Tensor, "B E"]
) -> tuple[Int[Tensor, "B T k"], Int[Tensor, "B T E"]]:
    """Choices that come too late are dropped: an expert takes the first `capacity` since counting last began anew.

    first: tokens before which counting begins anew. counts: what every expert was chosen by before these tokens, in the
    stretch that goes on. Returns the choices with E for those dropped, and the counts after every token.
    """
    asked = F.one_hot(experts, n_experts).sum(2)
    so_far = asked.cumsum(1)
    before = (
        torch.where(first[..., None], asked - so_far, 0).cummin(1).values
    )  # what the stretches before this one asked
    started = first.cumsum(1) > 0
    total = so_far + torch.where(started[..., None], before, counts[:, None])
    rank = total.gather(-1, experts)
    return experts.masked_fill(rank > capacity, n_experts), total
