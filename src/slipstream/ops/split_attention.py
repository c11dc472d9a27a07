r"""Attention of single tokens over a cache whose keys are kept in parts: what is tied to values, and what is turned by positions.

    o_t = sum_{s<=t} softmax_s(scale * sum_i q^i_t . k^i_s) v_s

The parts are caches of their own, each with its own number of heads, and are read where they lie: to join them would write
and read the whole cache once more for every token. A part may be the values themselves, or a piece of them. The logits of a
call are held whole, which is for steps; longer pieces join their keys and take `attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.ops.softmax import read_by_logits

Part = tuple[Float[Tensor, "B T H _K"], Float[Tensor, "B S _G _K"]]  # queries and keys that belong together


def split_attention(
    parts: Sequence[Part], v: Float[Tensor, "B S J V"], past: Int[Tensor, "B"], scale: float
) -> Float[Tensor, "B T H V"]:
    """Heads of keys and of values divide those of queries. q_t of row b stands at position past_b + t, and what
    the caches hold beyond is not seen."""
    products = [_products(q, k) for q, k in parts]
    logits = scale * torch.stack(products).sum(0, dtype=torch.promote_types(v.dtype, torch.float32))
    query, key = (torch.arange(n, device=v.device) for n in logits.shape[2:])
    seen = key <= past[:, None, None] + query[:, None]
    return read_by_logits(logits, v, seen[:, None])[0]


def _products(q: Float[Tensor, "B T H K"], k: Float[Tensor, "B S G K"]) -> Float[Tensor, "B H T S"]:
    """Heads that share keys are met by them like further queries, so that keys are read once."""
    heads = q.transpose(1, 2).unflatten(1, (k.shape[2], -1)).flatten(2, 3)
    return (heads @ k.permute(0, 2, 3, 1)).unflatten(2, (-1, q.shape[1])).flatten(1, 2)


def split_attention_flops(T: int, B: int, H: int, widths: Sequence[int], V: int) -> float:
    """Flops of one token after T; widths: of the parts."""
    return 2.0 * B * H * (T + 1) * (sum(widths) + V)


def reference(parts: Sequence[Part], v: Float[Tensor, "B S J V"], scale: float) -> Float[Tensor, "B T H V"]:
    """The definition, query by query, over the first T tokens."""
    H, T = parts[0][0].shape[2], parts[0][0].shape[1]
    q = torch.cat([q for q, _ in parts], -1)
    k = torch.cat([k.repeat_interleave(H // k.shape[2], 2) for _, k in parts], -1)
    v = v.repeat_interleave(H // v.shape[2], 2)
    outputs = []
    for t in range(T):
        weights = (scale * torch.einsum("bhk,bshk->bhs", q[:, t], k[:, : t + 1])).softmax(-1)
        outputs.append(torch.einsum("bhs,bshv->bhv", weights, v[:, : t + 1]))
    return torch.stack(outputs, 1)
