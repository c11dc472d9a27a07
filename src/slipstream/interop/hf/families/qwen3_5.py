"""Qwen3.5, dense, and its text alone (Qwen Team 2026): as Qwen3-Next, without experts, and with projections that stand apart.

Published files also have a network for images, and layers that predict several tokens at once: both are left unread. Rotary
positions of text are the same along all three axes that images have, so that their interleaving changes nothing.
"""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    GATED_MLP,
    NORMS,
    STEM,
    gated_mlp,
    layers_by_name,
    model_config,
    pattern,
    second_mixers,
    sizes,
    their_gated_mlp,
    their_sizes,
)
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


class Qwen35(Family):
    model_types = ("qwen3_5_text", "qwen3_5")
    architecture = "Qwen3_5ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        return of_text(hf, self._text)

    @staticmethod
    def _text(hf: Fields) -> ModelConfig:
        hf.only("attn_output_gate", True)
        about = sizes(hf)
        n, eps = about["n_layers"], about["norm_eps"]
        mixers = {"linear_attention": delta(hf, eps), "full_attention": gated_attention(hf, eps)}
        mlp = gated_mlp(hf)
        return model_config(pattern((mixers[kind], mlp) for kind in layer_kinds(hf, n)), about, norm="rms_plus_one")

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers = layers_by_name(model, "gated_deltanet", "attention")
        return {
            **their_sizes(model),
            **their_delta(layers["gated_deltanet"].values()),
            **their_gated_attention(layers["attention"].values()),
            **their_gated_mlp(second_mixers(model)),
            "layer_types": their_layer_kinds(layers, "gated_deltanet"),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers = layers_by_name(model, "gated_deltanet", "attention")
        return [
            *STEM,
            *in_blocks([*NORMS, *GATED_MLP], range(model.config.n_layers)),
            *in_blocks(apart_delta_rules(next(iter(layers["gated_deltanet"].values()))), layers["gated_deltanet"]),
            *in_blocks(gated_attention_rules(next(iter(layers["attention"].values()))), layers["attention"]),
        ]

    def spelling(self, name: str) -> str:
        return text_name(name)

    def surplus(self, name: str, config: ModelConfig) -> bool:
        return is_no_text(name) or super().surplus(name, config)
