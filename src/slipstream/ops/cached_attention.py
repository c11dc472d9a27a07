r"""Softmax attention of one token a row over a cache laid out by position, of which the first tokens are filled.

    o = sum_{s < e} softmax_s(scale * q . k_s) v_s

Reading the cache is nearly all of the work, so what is not filled must not be read.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.ops.dispatch import operator
from slipstream.ops.softmax import PLAIN, Softmax, read
from slipstream.ops.valid import valid_mask


@operator()
def cached_attention(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    ends: Int[Tensor, "B"],
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "B 1 H V"]:
    """Each row's query sees the keys before its end; G key heads serve H query heads (G divides H). No keys read zero."""
    if not torch.compiler.is_compiling():  # a captured graph must not ask what a number is, and reads all that there is
        filled = int(ends.max()) if len(ends) else 0
        k, v = k[:, :filled], v[:, :filled]
    return read(q, k, v, valid_mask(ends, k.shape[1])[:, None, None], softmax)


def reference(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, softmax: Softmax = PLAIN) -> Float[Tensor, "B 1 H V"]:
    """Row by row and head by head."""
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    shared = q.shape[2] // k.shape[2]
    for b, end in enumerate(ends.tolist()):
        for h in range(q.shape[2]):
            keys, values = k[b, :end, h // shared], v[b, :end, h // shared]
            logits = softmax.capped(keys @ q[b, 0, h] * softmax.scale_of(q.shape[3]))
            if softmax.sinks is not None:
                logits = torch.cat([logits, softmax.sinks[h : h + 1]])
            if len(logits):
                o[b, 0, h] = logits.softmax(0)[:end] @ values
    return o
