r"""Attention of single tokens over a cache of factors: every key and value is a sum of a few outer products.

    k_s^h = (1/R) sum_r a_s^{hr} b_s^r      l_ts^h = scale * q_t^h . k_s^h = scale / R * sum_r a_s^{hr} (q_t^h . b_s^r)
    v_s^h likewise                          o_t^h = sum_s p_ts^h v_s^h     = (1/R) sum_{s,r} (p_ts^h a_s^{hr}) b_s^r

Neither keys nor values are ever made: the b are met as if they were keys and values of one head, and the a weigh what comes
out. Queries are factors too (Q of them), so that products of width K are made Q times and not once for every head. As in
the authors' FlashTPA (Zhang et al. 2025, arXiv:2501.06425). The logits of a call are held whole, which is for steps; longer
pieces make their keys and take `attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Factors(NamedTuple):
    """Heads (B T H K) as the mean over R of a (of a head) times b (of all heads)."""

    a: Float[Tensor, "B T H R"]
    b: Float[Tensor, "B T R K"]

    def product(self) -> Float[Tensor, "B T H K"]:
        return self.a @ self.b / self.b.shape[2]


def factored_attention(
    q: Factors, k: Factors, v: Factors, past: Int[Tensor, "B"], scale: float
) -> Float[Tensor, "B T H V"]:
    """q_t of row b stands at position past_b + t; k and v are caches, and what they hold beyond is not seen."""
    wide, T, S = torch.promote_types(k.b.dtype, torch.float32), q.b.shape[1], k.b.shape[1]
    met = q.b.flatten(1, 2) @ k.b.flatten(1, 2).mT  # every factor of a query with every factor of a key
    met = q.a @ met.unflatten(1, (T, -1)) / q.b.shape[2]  # B T H (S R)
    logits = scale * (met.unflatten(-1, (S, -1)) * k.a.transpose(1, 2)[:, None]).mean(-1).to(wide)
    unseen = torch.arange(S, device=past.device) > (past[:, None] + torch.arange(T, device=past.device))[..., None]
    weights = logits.masked_fill(unseen[:, :, None], -torch.inf).softmax(-1).to(v.b.dtype)
    shares = weights[..., None] * v.a.transpose(1, 2)[:, None] / v.b.shape[2]
    return (shares.flatten(3).flatten(1, 2) @ v.b.flatten(1, 2)).unflatten(1, (T, -1))


def factored_attention_flops(T: int, B: int, H: int, K: int, ranks: tuple[int, int, int]) -> float:
    """Flops of one token after T; ranks: of queries, keys and values."""
    Q, R, V = ranks
    return 2.0 * B * (T + 1) * (Q * R * K + H * Q * R + H * V * K)


def reference(q: Factors, k: Factors, v: Factors, scale: float) -> Float[Tensor, "B T H V"]:
    """The definition over the first T tokens, query by query and head by head, of keys and values summed out."""
    heads = [torch.einsum("bthr,btrk->bthk", *f) / f.b.shape[2] for f in (q, k, v)]
    outputs = []
    for t in range(heads[0].shape[1]):
        logits = scale * torch.einsum("bhk,bshk->bhs", heads[0][:, t], heads[1][:, : t + 1])
        outputs.append(torch.einsum("bhs,bshv->bhv", logits.softmax(-1), heads[2][:, : t + 1]))
    return torch.stack(outputs, 1)
