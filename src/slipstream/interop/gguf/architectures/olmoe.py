"""OLMoE: norms of all queries and all keys together, and experts whose weights do not sum to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


class Olmoe(Architecture):
    name = "olmoe"
    model_type = "olmoe"
    modules = NORMS | ATTENTION | QK_NORMS | {"mlp.gate": "ffn_gate_inp"}

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        config = decoder(said, there)
        said.only(WIDTH, config["intermediate_size"])
        return config | of_mixture(said, "num_experts") | {"rope_parameters": rope(said), "norm_topk_prob": False}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        said = their_decoder(config) | their_rope(config["rope_parameters"])
        return said | their_mixture(config, "num_experts")

    def regrouped(self, config: Mapping[str, Any]) -> list[Rule]:
        return experts("mlp.experts", config["num_experts"])
