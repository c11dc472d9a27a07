"""Qwen3.5 with experts, and its text alone (Qwen Team 2026): as Qwen3.5, and in every layer many small experts and a shared one.

Transformers writes every expert by itself; published files have those of a layer as one tensor. Both are read.
"""

from __future__ import annotations

from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.hf.decoder import (
    NORMS,
    STEM,
    layers_by_name,
    model_config,
    pattern,
    sizes,
    their_sizes,
)
from slipstream.interop.hf.experts import feedforwards, shared_mixture, shared_mixture_rules, their_shared_mixture
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.gated_delta import (
    apart_delta_rules,
    delta,
    gated_attention,
    gated_attention_rules,
    is_no_text,
    layer_kinds,
    of_text,
    text_name,
    their_delta,
    their_gated_attention,
    their_layer_kinds,
)
from slipstream.interop.hf.weights import Rule, in_blocks
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

UNUSED = ("intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")  # of Qwen3-Next's settings


class Qwen35MoE(Family):
    model_types = ("qwen3_5_moe_text", "qwen3_5_moe")
    architecture = "Qwen3_5MoeForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        return of_text(hf, self._text)

    @staticmethod
    def _text(hf: Fields) -> ModelConfig:
        hf.only("attn_output_gate", True)
        hf.ignore(*UNUSED)
        about = sizes(hf)
        n, eps = about["n_layers"], about["norm_eps"]
        mixers = {"linear_attention": delta(hf, eps), "full_attention": gated_attention(hf, eps)}
        moe = shared_mixture(hf, n, normalised=True)
        return model_config(pattern((mixers[kind], moe) for kind in layer_kinds(hf, n)), about, norm="rms_plus_one")

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers, (dense, sparse) = layers_by_name(model, "gated_deltanet", "attention"), feedforwards(model)
        if dense:
            raise InputError(f"this family has experts in every layer, and layer {next(iter(dense))} has none")
        return {
            **their_sizes(model),
            **their_delta(layers["gated_deltanet"].values()),
            **their_gated_attention(layers["attention"].values()),
            **their_shared_mixture(sparse.values()),
            "layer_types": their_layer_kinds(layers, "gated_deltanet"),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers, (_, sparse) = layers_by_name(model, "gated_deltanet", "attention"), feedforwards(model)
        moe = shared_mixture_rules(next(iter(sparse.values())), stacked=True)
        return [
            *STEM,
            *in_blocks([*NORMS, *moe], range(model.config.n_layers)),
            *in_blocks(apart_delta_rules(next(iter(layers["gated_deltanet"].values()))), layers["gated_deltanet"]),
            *in_blocks(gated_attention_rules(next(iter(layers["attention"].values()))), layers["attention"]),
        ]

    def spelling(self, name: str) -> str:
        return text_name(name)

    def surplus(self, name: str, config: ModelConfig) -> bool:
        return is_no_text(name) or super().surplus(name, config)
