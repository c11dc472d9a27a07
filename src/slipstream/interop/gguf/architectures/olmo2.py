"""OLMo 2: norms of what a layer says, and of all queries and all keys together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import (
    ATTENTION,
    GATED_MLP,
    QK_NORMS,
    Architecture,
    There,
    decoder,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.hf.fields import Fields

AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}


class Olmo2(Architecture):
    name = "olmo2"
    model_type = "olmo2"
    modules = AFTER | ATTENTION | QK_NORMS | GATED_MLP

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        return decoder(said, there) | {"rope_parameters": rope(said)}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["attention_bias"]:
            raise InputError("olmo2 in llama.cpp has no biases")
        return their_decoder(config) | their_rope(config["rope_parameters"])
