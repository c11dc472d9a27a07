"""Qwen 3 with experts in every layer, whose weights sum to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import (
    ATTENTION,
    NORMS,
    QK_NORMS,
    Architecture,
    There,
    decoder,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.gguf.experts import WIDTH, experts, of_mixture, their_mixture
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule


class Qwen3Moe(Architecture):
    name = "qwen3moe"
    model_type = "qwen3_moe"
    modules = NORMS | ATTENTION | QK_NORMS | {"mlp.gate": "ffn_gate_inp"}

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        config = decoder(said, there) | of_mixture(said, "num_experts")
        return config | {
            "rope_parameters": rope(said),
            "moe_intermediate_size": said.whole(WIDTH, config["intermediate_size"] // config["num_experts_per_tok"]),
            "norm_topk_prob": True,
            "use_sliding_window": False,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["mlp_only_layers"]:
            raise InputError("qwen3moe in llama.cpp has experts in every layer")
        said = their_decoder(config) | their_rope(config["rope_parameters"]) | their_mixture(config, "num_experts")
        return said | {WIDTH: config["moe_intermediate_size"]}

    def regrouped(self, config: Mapping[str, Any]) -> list[Rule]:
        return experts("mlp.experts", config["num_experts"])
