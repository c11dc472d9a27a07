"""Mistral 7B (Jiang et al. 2023, arXiv:2310.06825): Llama without biases, and in its first version with a sliding window."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    attention_layers,
    decoder_rules,
    gated_mlp,
    heads,
    model_config,
    part,
    pattern,
    rope,
    second_mixers,
    sizes,
    their_gated_mlp,
    their_heads,
    their_rope,
    their_sizes,
    their_windows,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel


class Mistral(Family):
    model_types = ("mistral",)
    architecture = "MistralForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        window = hf.whole("sliding_window", None)
        name = "sliding_window" if window else "attention"
        return model_config(pattern([(part(name, heads(hf), rope(hf), window=window), gated_mlp(hf))]), sizes(hf))

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        attention = attention_layers(model, "attention", "sliding_window")
        return {
            **their_sizes(model),
            **their_heads(attention),
            **their_gated_mlp(second_mixers(model)),
            "rope_parameters": their_rope(attention),
            "sliding_window": their_windows(attention)["sliding_window"],
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        return decoder_rules(model)
