"""Granite 4: mostly Mamba-2, attention with positions or without, and several multipliers. Its experts' gates and ups are apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slipstream.core.errors import InputError
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
from slipstream.interop.gguf.experts import SHARED_WIDTH, of_mixture, their_mixture
from slipstream.interop.gguf.hybrid import attention_places, their_places
from slipstream.interop.gguf.state_space import MAMBA2, SSD_SIZES, WIDE, expansion, ssd_changes
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule

EXPERTS = {
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.output_linear": "ffn_down_exps",
}
SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
POSITIONS = "rope.scaling.finetuned"  # what llama.cpp calls it whether there are positions


class GraniteHybrid(Architecture):
    name = "granitehybrid"
    model_type = "granitemoehybrid"
    modules = NORMS | ATTENTION | MAMBA2 | EXPERTS
    wide = WIDE | {"ssm_norm"}

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        alike, places = attention_places(said)
        config, sparse = decoder(alike, there), said.whole("expert_count", 0, least=0) > 0
        placed, expand = said.flag(POSITIONS, False), expansion(said)
        sizes = {theirs: said.whole(name) for theirs, name in SSD_SIZES.items()}
        return {
            **config,
            **(of_mixture(said, "num_local_experts") if sparse else self._dense(said)),
            **sizes,
            **{theirs: said.number(name, None) for theirs, name in SCALES.items() if said.has(name)},
            "shared_intermediate_size": said.whole(SHARED_WIDTH, config["intermediate_size"]),
            "layer_types": ["full_attention" if here else "linear_attention" for here in places],
            "rope_parameters": rope(said),
            "position_embedding_type": "rope" if placed else "nope",
            "mamba_expand": expand,
            "mamba_d_head": expand * config["hidden_size"] // sizes["mamba_n_heads"],
            "mamba_proj_bias": False,
            "mamba_conv_bias": any(n.endswith("ssm_conv1d.bias") for n in there.shapes),
            "attention_bias": any(n.endswith("attn_q.bias") for n in there.shapes),
        }

    @staticmethod
    def _dense(said: Fields) -> dict[str, int]:
        said.ignore("expert_used_count")
        return {"num_local_experts": 0}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        inner = config["mamba_n_heads"] * config["mamba_d_head"]
        if inner != 2 * config["hidden_size"] or config["mamba_proj_bias"] or "time_step_limit" in config:
            raise InputError(
                "granitehybrid in llama.cpp has Mamba-2 of twice the width, without biases on projections or bounded steps"
            )
        placed = config["position_embedding_type"] == "rope"
        width = config["shared_intermediate_size"]
        sparse = (
            their_mixture(config, "num_local_experts") | {SHARED_WIDTH: width} if config["num_local_experts"] else {}
        )
        return {
            **their_decoder(config),
            **({} if sparse else {"feed_forward_length": width}),
            **sparse,
            **(their_rope(config["rope_parameters"]) if placed else {}),
            **their_places([kind == "full_attention" for kind in config["layer_types"]], config["num_key_value_heads"]),
            **{name: config[theirs] for theirs, name in SSD_SIZES.items()},
            **{name: float(config[theirs]) for theirs, name in SCALES.items()},
            "ssm.inner_size": inner,
            POSITIONS: placed,
        }

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return {
            **ssd_changes(config["mamba_n_groups"]),
            "attn_q": interleaved(config["num_attention_heads"]),
            "attn_k": interleaved(config["num_key_value_heads"]),
        }

    def regrouped(self, config: Mapping[str, Any]) -> list[Rule]:
        shared = "%s_shexp.weight" if config["num_local_experts"] else "%s.weight"
        return [
            _gate_and_up("ffn_%s_exps.weight", "block_sparse_moe.input_linear.weight"),
            _gate_and_up(shared.replace("%s", "ffn_%s"), "shared_mlp.input_linear.weight"),
            Rule((shared % "ffn_down",), ("shared_mlp.output_linear.weight",)),
        ]


def _gate_and_up(name: str, theirs: str) -> Rule:
    """One tensor of transformers', of each expert's rows the gate's first."""
    return Rule(
        (name % "gate", name % "up"),
        (theirs,),
        read=lambda tensors: [torch.cat(list(tensors), -2)],
        write=lambda tensors: list(tensors[0].chunk(2, -2)),
    )
