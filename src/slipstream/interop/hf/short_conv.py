"""What LFM2 with and without experts shares: its double-gated convolutions, its attention, its names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from slipstream.core.mixer import Mixer
from slipstream.interop.hf.decoder import heads, part, rope, their_heads, their_rope, values
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import rename, renames
from slipstream.models.pattern import Part

EPS = "norm_eps"
KINDS = {"conv": "lfm2_conv", "full_attention": "attention"}
NORMS = [rename("operator_norm", "norms.0"), rename("ffn_norm", "norms.1")]
GATED = [
    rename("feed_forward.w1", "mixers.1.gate_proj"),
    rename("feed_forward.w3", "mixers.1.up_proj"),
    rename("feed_forward.w2", "mixers.1.down_proj"),
]
ATTENTION = [
    *renames("self_attn", "mixers.0.qkv", "q_proj k_proj v_proj"),
    rename("self_attn.q_layernorm", "mixers.0.qkv.q_norm"),
    rename("self_attn.k_layernorm", "mixers.0.qkv.k_norm"),
    rename("self_attn.out_proj", "mixers.0.o_proj"),
]
CONVOLUTION = [rename("conv", "mixers.0")]


def mixers(hf: Fields, norm_eps: float) -> dict[str, Part]:
    """By transformers' words for layers."""
    return {
        "full_attention": part("attention", heads(hf), rope(hf, base=1e6), qk_norm=True, qk_norm_eps=norm_eps),
        "conv": part("lfm2_conv", conv_size=hf.whole("conv_L_cache", 3), bias=hf.flag("conv_bias", False)),
    }


def their_mixers(attention: Iterable[Mixer], convs: Iterable[Mixer]) -> dict[str, Any]:
    """The inverse."""
    attention, convs = list(attention), list(convs)
    return {
        **their_heads(attention),
        "rope_parameters": their_rope(attention),
        "conv_L_cache": one_of_each((values(m)["conv_size"] for m in convs), "conv_size"),
        "conv_bias": one_of_each((values(m)["bias"] for m in convs), "bias"),
    }


def tied(hf: Fields) -> bool:
    """Under either of two names."""
    return hf.flag("tie_embedding", hf.flag("tie_word_embeddings", True))
