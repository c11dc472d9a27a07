"""OLMo 2 (OLMo Team 2024, arXiv:2501.00656): norms of what a mixer says and not of what it reads, and of all of q and of k."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    ATTENTION,
    GATED_MLP,
    attention_layers,
    biases,
    decoder_rules,
    gated_mlp,
    heads,
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
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

AFTER = [rename("post_attention_layernorm", "out_norms.0"), rename("post_feedforward_layernorm", "out_norms.1")]


class Olmo2(Family):
    model_types = ("olmo2",)
    architecture = "Olmo2ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, eps=1e-5)
        norms = {"qk_norm": "whole", "qk_norm_eps": about["norm_eps"]}
        attention = part("attention", heads(hf), rope(hf), biases(hf), norms)
        return model_config(pattern([(attention, gated_mlp(hf))]), about, norm_place="after")

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        attention = attention_layers(model, "attention")
        return {
            **their_sizes(model),
            **their_heads(attention),
            **their_gated_mlp(second_mixers(model)),
            **their_biases(attention),
            "rope_parameters": their_rope(attention),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        return decoder_rules(model, [*AFTER, *ATTENTION, *GATED_MLP])
