"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv:2407.10671): Llama with biases on queries, keys and values."""

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
    qwen_windows,
    rope,
    second_mixers,
    sizes,
    their_gated_mlp,
    their_heads,
    their_qwen_windows,
    their_rope,
    their_sizes,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel


class Qwen2(Family):
    model_types = ("qwen2",)
    architecture = "Qwen2ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about, mlp = sizes(hf), gated_mlp(hf)
        settings = heads(hf) | rope(hf) | {"qkv_bias": True}
        layers = qwen_windows(hf, about["n_layers"])
        return model_config(pattern((part(name, settings, window), mlp) for name, window in layers), about)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        attention = attention_layers(model, "attention", "sliding_window")
        return {
            **their_sizes(model),
            **their_heads(attention),
            **their_gated_mlp(second_mixers(model)),
            **their_qwen_windows(attention),
            "rope_parameters": their_rope(attention),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        return decoder_rules(model)
