"""Qwen 3 (Yang et al. 2025, arXiv:2505.09388): Llama with norms of queries and keys in each head, and heads of their own width."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    attention_layers,
    biases,
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
    their_biases,
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

HEAD_DIM = 128  # where its settings do not say


class Qwen3(Family):
    model_types = ("qwen3",)
    architecture = "Qwen3ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about, mlp = sizes(hf), gated_mlp(hf)
        settings = heads(hf, HEAD_DIM) | rope(hf) | biases(hf) | {"qk_norm": True, "qk_norm_eps": about["norm_eps"]}
        layers = qwen_windows(hf, about["n_layers"])
        return model_config(pattern((part(name, settings, window), mlp) for name, window in layers), about)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        attention = attention_layers(model, "attention", "sliding_window")
        return {
            **their_sizes(model),
            **their_heads(attention),
            **their_gated_mlp(second_mixers(model)),
            **their_qwen_windows(attention),
            **their_biases(attention),
            "rope_parameters": their_rope(attention),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        return decoder_rules(model)
