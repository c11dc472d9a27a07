"""Qwen 3: norms of queries and keys instead of biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.interop.gguf.architecture import (
    ATTENTION,
    GATED_MLP,
    NORMS,
    QK_NORMS,
    Architecture,
    There,
    decoder,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.hf.fields import Fields


class Qwen3(Architecture):
    name = "qwen3"
    model_type = "qwen3"
    modules = NORMS | ATTENTION | QK_NORMS | GATED_MLP

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        return decoder(said, there) | {"rope_parameters": rope(said)}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return their_decoder(config) | their_rope(config["rope_parameters"])
