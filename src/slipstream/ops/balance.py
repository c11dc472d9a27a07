r"""What keeps the experts of a mixture evenly used, from the load: how often each was chosen.

    balance = E sum_i f_i P_i        f_i = load_i / sum load        P_i = mean over tokens of p_ti        1 when all is even
    z = mean over tokens of (log sum_i exp s_ti)^2        b_i <- b_i + u sign(mean load - load_i)

balance: Fedus, Zoph, Shazeer 2021 (Switch), arXiv:2101.03961, eq. 4, with f a share of choices for any k; the load may be that
of more tokens than those of p, as of a whole batch that is read in parts (Qiu et al. 2025, arXiv:2501.11873). z: Zoph et al.
2022 (ST-MoE), arXiv:2202.08906, eq. 5. b, added to scores for the choice alone: Wang et al. 2024, arXiv:2408.15664.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.ops.route import Gate


def balance_loss(p: Float[Tensor, "*B E"], load: Int[Tensor, "E"]) -> Float[Tensor, ""]:
    """Differentiable in p. What was chosen is taken as it is."""
    share = load.to(p.dtype) / load.sum().clamp(min=1)
    return len(load) * (share * p.flatten(0, -2).mean(0)).sum()


def z_loss(logits: Float[Tensor, "*B E"]) -> Float[Tensor, ""]:
    return logits.logsumexp(-1).square().mean()


def probabilities(logits: Float[Tensor, "*B E"], gate: Gate) -> Float[Tensor, "*B E"]:
    """Scores that sum to one over the experts: a softmax, or sigmoids over their sum (DeepSeek-V3, eq. 19)."""
    return logits.softmax(-1) if gate == "softmax" else torch.nn.functional.logsigmoid(logits).softmax(-1)


def moved_bias(bias: Float[Tensor, "E"], load: Int[Tensor, "E"], rate: float) -> Float[Tensor, "E"]:
    """The bias of the next choice: up by the rate for experts below the mean load, down for those above."""
    load = load.to(bias.dtype)
    return bias + rate * (load.mean() - load).sign()
