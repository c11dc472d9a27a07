"""Plain projections to queries and to fewer keys and values, and forget gates that lower logits: what softmax mixers
share that do more to q, k and v than GroupedQKV does. Weights stay the mixer's own: q_proj, k_proj, v_proj, o_proj.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from slipstream.core.config import heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer
from slipstream.layers.linear import Linear


def add_grouped_lines(mixer: Mixer, n_heads: int | None, n_kv_heads: int | None) -> tuple[int, int, int]:
    """Give the mixer its projections; returns n_heads, n_kv_heads and head_dim."""
    d_model = mixer.config.d_model
    n_heads = heads(d_model, n_heads)
    n_kv_heads, head_dim = n_kv_heads or n_heads, d_model // n_heads
    if n_heads % n_kv_heads:
        raise InputError(f"n_heads {n_heads} does not divide into n_kv_heads {n_kv_heads} groups")
    widths = {"q": d_model, "k": n_kv_heads * head_dim, "v": n_kv_heads * head_dim, "o": d_model}
    for name, width in widths.items():
        mixer.add_module(f"{name}_proj", Linear(d_model, width, bias=False))
    return n_heads, n_kv_heads, head_dim


def grouped_lines(mixer: Mixer, x: Float[Tensor, "B T D"], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B T H K), k and v (B T G K)."""
    q, k, v = (mixer.get_submodule(f"{n}_proj")(x).unflatten(-1, (-1, head_dim)) for n in "qkv")
    return q, k, v


def log_forget(logits: Float[Tensor, "B T H"]) -> Float[Tensor, "B T H"]:
    """log sigmoid, in float32 at least."""
    return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def forget_bias(log_f: Float[Tensor, "B S H"]) -> Float[Tensor, "B S H"]:
    """What a key's logits gain: at query t, key s gains log f_{s+1} + ... + log f_t, less what all keys of t lose alike.

    Summed anew from single gates and in float64: a running sum in float32 would lose the last ones.
    """
    return -log_f.double().cumsum(1)
