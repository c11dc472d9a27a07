"""What LFM2 with and without experts share in GGUF files: a layer that has no heads of keys is a convolution, and the last norm
is called that of the embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import STEM, There, decoder, rope, their_decoder, their_rope
from slipstream.interop.gguf.hybrid import attention_places, their_places
from slipstream.interop.hf.fields import Fields

AROUND = STEM | {"model.embedding_norm": "token_embd_norm"}
NAMES = {
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_layernorm": f"attn_{x}_norm" for x in "qk"},
    "self_attn.out_proj": "attn_output",
    **{f"conv.{x}": f"shortconv.{x}" for x in ("conv", "in_proj", "out_proj")},
}


def of_short_conv(said: Fields, there: There) -> dict[str, Any]:
    """config.json of what both have."""
    alike, places = attention_places(said)
    config = decoder(alike, there) | {"rope_parameters": rope(alike, 1e6)}
    return config | {
        "norm_eps": config.pop("rms_norm_eps"),
        "conv_L_cache": said.whole("shortconv.l_cache"),
        "layer_types": ["full_attention" if here else "conv" for here in places],
    }


def their_short_conv(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse."""
    if config["conv_bias"]:
        raise InputError("lfm2 in llama.cpp has no biases")
    places = [kind == "full_attention" for kind in config["layer_types"]]
    return {
        **their_decoder({**config, "rms_norm_eps": config["norm_eps"]}),
        **their_rope(config["rope_parameters"]),
        **their_places(places, config["num_key_value_heads"]),
        "shortconv.l_cache": config["conv_L_cache"],
    }
