"""Mixtral: what llama.cpp calls llama too, with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.interop.gguf.architecture import (
    ATTENTION,
    NORMS,
    Architecture,
    Change,
    There,
    decoder,
    interleaved,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.gguf.experts import WIDTH, experts, of_mixture, their_mixture
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule


class Mixtral(Architecture):
    name = "llama"
    label = "mixtral"
    model_type = "mixtral"
    modules = NORMS | ATTENTION | {"block_sparse_moe.gate": "ffn_gate_inp"}

    def reads(self, said: Mapping[str, Any]) -> bool:
        return bool(said.get("expert_count"))

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        config = decoder(said, there)
        said.only(WIDTH, config["intermediate_size"])
        return config | of_mixture(said, "num_local_experts") | {"rope_parameters": rope(said), "sliding_window": None}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        said = their_decoder(config) | their_rope(config["rope_parameters"])
        return said | their_mixture(config, "num_local_experts")

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return {
            "attn_q": interleaved(config["num_attention_heads"]),
            "attn_k": interleaved(config["num_key_value_heads"]),
        }

    def regrouped(self, config: Mapping[str, Any]) -> list[Rule]:
        return experts("block_sparse_moe.experts", config["num_local_experts"], ("w1", "w3", "w2"))
