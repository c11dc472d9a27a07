"""Llama 1 to 3 (Touvron et al. 2023, arXiv:2302.13971), and all who write their checkpoints in its form: SmolLM, TinyLlama."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    attention_layers,
    biases,
    decoder_rules,
    gated_mlp,
    heads,
    mlp_bias,
    model_config,
    part,
    pattern,
    rope,
    second_mixers,
    sizes,
    their_biases,
    their_gated_mlp,
    their_heads,
    their_rope,
    their_sizes,
    values,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel


class Llama(Family):
    model_types = ("llama",)
    architecture = "LlamaForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        attention = part("attention", heads(hf), rope(hf), biases(hf))
        mlp = gated_mlp(hf, **mlp_bias(hf))
        return model_config(pattern([(attention, mlp)]), sizes(hf))

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        attention, mlps = attention_layers(model, "attention"), list(second_mixers(model))
        return {
            **their_sizes(model),
            **their_heads(attention),
            **their_gated_mlp(mlps),
            "rope_parameters": their_rope(attention),
            **their_biases(attention),
            "mlp_bias": one_of_each((values(m)["bias"] for m in mlps), "bias"),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        return decoder_rules(model)
