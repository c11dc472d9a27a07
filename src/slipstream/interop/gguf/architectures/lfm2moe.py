"""LFM2 with experts, chosen by sigmoids and a bias on the choice, in all layers but the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import Architecture, Change, There
from slipstream.interop.gguf.experts import DENSE, GATING, SIGMOID, WIDTH, experts, of_mixture, their_mixture
from slipstream.interop.gguf.short_conv import AROUND, NAMES, of_short_conv, their_short_conv
from slipstream.interop.gguf.state_space import convolution
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule

MOE = {"feed_forward.gate": "ffn_gate_inp", "feed_forward.expert_bias": "exp_probs_b.bias"}
KNOWN = {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_expert_bias": True}


class LFM2MoE(Architecture):
    name = "lfm2moe"
    model_type = "lfm2_moe"
    stem = AROUND
    modules = NAMES | MOE
    wide = frozenset({"shortconv.conv"})

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        said.only(GATING, SIGMOID)
        config = of_short_conv(said, there) | of_mixture(said, "num_experts") | KNOWN
        return config | {
            "moe_intermediate_size": said.whole(WIDTH),
            "num_dense_layers": said.whole(DENSE, 0, least=0),
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if any(config[name] != value for name, value in KNOWN.items()):
            raise InputError("lfm2moe in llama.cpp has experts whose weights sum to one, and a bias on their choice")
        said = their_short_conv(config) | their_mixture(config, "num_experts")
        return said | {WIDTH: config["moe_intermediate_size"], DENSE: config["num_dense_layers"], GATING: SIGMOID}

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return {"shortconv.conv": convolution()}

    def regrouped(self, config: Mapping[str, Any]) -> list[Rule]:
        return experts("feed_forward.experts", config["num_experts"], ("w1", "w3", "w2"))
