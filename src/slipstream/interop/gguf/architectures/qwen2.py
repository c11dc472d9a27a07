"""Qwen 2 and 2.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.interop.gguf.architecture import (
    ATTENTION,
    GATED_MLP,
    NORMS,
    Architecture,
    There,
    decoder,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.hf.fields import Fields


class Qwen2(Architecture):
    name = "qwen2"
    model_type = "qwen2"
    modules = NORMS | ATTENTION | GATED_MLP

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        return decoder(said, there) | {"rope_parameters": rope(said)}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return their_decoder(config) | their_rope(config["rope_parameters"])
