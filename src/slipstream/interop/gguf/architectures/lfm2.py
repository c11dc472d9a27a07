"""LFM2: a layer that has no heads of keys is a convolution. Its last norm is called that of the embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import (
    STEM,
    Architecture,
    Change,
    There,
    decoder,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.gguf.state_space import convolution
from slipstream.interop.hf.fields import Fields

KV = "attention.head_count_kv"  # one number a layer
NORM = {"model.embedding_norm": "token_embd_norm"}
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


class LFM2(Architecture):
    name = "lfm2"
    model_type = "lfm2"
    stem = STEM | NORM
    modules = NAMES
    wide = frozenset({"shortconv.conv"})

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        counts = said.wholes(KV)
        if not counts or len(set(counts) - {0}) != 1:
            raise InputError(f"{said.owner}: {KV} must be zeros for convolutions, and one number for attention")
        alike = Fields(said.table | {KV: max(counts)}, said.owner)
        config = decoder(alike, there) | {"rope_parameters": rope(alike, 1e6)}
        said.ignore(*alike.asked)
        return config | {
            "norm_eps": config.pop("rms_norm_eps"),
            "conv_L_cache": said.whole("shortconv.l_cache"),
            "layer_types": ["full_attention" if n else "conv" for n in counts],
            "block_auto_adjust_ff_dim": False,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["conv_bias"]:
            raise InputError("lfm2 in llama.cpp has no biases")
        counts = [config["num_key_value_heads"] * (kind == "full_attention") for kind in config["layer_types"]]
        said = their_decoder({**config, "rms_norm_eps": config["norm_eps"]}) | their_rope(config["rope_parameters"])
        return said | {KV: counts, "shortconv.l_cache": config["conv_L_cache"]}

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return {"shortconv.conv": convolution()}
