"""Gemma 2: windows in every other layer, capped logits. The largest model's own scale of logits is known by heart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.interop.gguf.architecture import (
    AROUND,
    ATTENTION,
    GATED_MLP,
    Architecture,
    Change,
    There,
    decoder,
    plus_one,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.hf.fields import Fields

LARGEST = 46  # layers of the 27B, whose logits are scaled by d_model over the heads
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


class Gemma2(Architecture):
    name = "gemma2"
    model_type = "gemma2"
    modules = AROUND | ATTENTION | GATED_MLP

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        config = decoder(said, there)
        largest = config["num_hidden_layers"] == LARGEST
        return config | {
            "rope_parameters": rope(said),
            "sliding_window": said.whole("attention.sliding_window", 4096),
            "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
            if largest
            else config["head_dim"],
            **{name: said.number(name, cap) for name, cap in CAPS.items()},
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        caps = {name: config[name] for name in CAPS if config[name] is not None}
        window = {"attention.sliding_window": config["sliding_window"]}
        return their_decoder(config) | their_rope(config["rope_parameters"]) | caps | window

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return plus_one("output_norm", *AROUND.values())
