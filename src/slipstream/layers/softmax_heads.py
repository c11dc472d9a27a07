"""What a softmax mixer may set beside its queries, keys and values: how logits become weights, and what becomes of outputs."""

from __future__ import annotations

from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from slipstream.layers.grouped_qkv import GroupedConfig
from slipstream.layers.linear import Linear


class SoftmaxConfig(GroupedConfig):
    """Settings of a mixer that can be what trained softmax models are."""

    head_dim: PositiveInt | None = None  # width of a head; default d_model / n_heads
    qk_scale: PositiveFloat | None = None  # factor on q . k; default 1 / sqrt(head_dim)
    softcap: PositiveFloat | None = None  # keeps logits within +- c, by c tanh(logit / c) (Gemma 2)
    sinks: bool = False  # a learned logit a head that takes weight and gives no value (gpt-oss)
    gated: bool = False  # the heads' outputs times sigmoid(W_g x), channel by channel (Qwen3-Next)
    o_bias: bool = False  # a bias on the output projection (gpt-oss)


def joined(o: Float[Tensor, "B T H V"], x: Float[Tensor, "B T D"], g_proj: Linear | None) -> Float[Tensor, "B T I"]:
    """Heads side by side, times sigmoid(W_g x) where there is such a gate (Qiu et al. 2025, arXiv:2505.06708)."""
    return o.flatten(2) if g_proj is None else o.flatten(2) * g_proj(x).sigmoid()
