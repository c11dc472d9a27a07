"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): many narrow experts, and norms over all of q and of k."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    ATTENTION,
    NORMS,
    attention_layers,
    biases,
    decoder_rules,
    heads,
    model_config,
    part,
    pattern,
    rope,
    second_mixers,
    sizes,
    their_biases,
    their_heads,
    their_rope,
    their_sizes,
    values,
)
from slipstream.interop.hf.experts import EXPERT_NAMES, expert_rules, mixture, their_mixture
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel


class Olmoe(Family):
    model_types = ("olmoe",)
    architecture = "OlmoeForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, eps=1e-5)
        hf.only("clip_qkv", None)
        norms = {"qk_norm": "whole", "qk_norm_eps": about["norm_eps"]}
        attention = part("attention", heads(hf), rope(hf), biases(hf), norms)
        normalised = hf.flag("norm_topk_prob", False)
        moe = mixture(hf, "num_experts", "intermediate_size", about["n_layers"], normalised=normalised)
        return model_config(pattern([(attention, moe)]), about)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        attention, moes = attention_layers(model, "attention"), list(second_mixers(model, "moe"))
        return {
            **their_sizes(model),
            **their_heads(attention),
            **their_mixture(moes, "num_experts", "intermediate_size"),
            **their_biases(attention),
            "rope_parameters": their_rope(attention),
            "norm_topk_prob": one_of_each((values(m)["normalised"] for m in moes), "normalised"),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        count = values(next(second_mixers(model, "moe")))["n_experts"]
        experts = expert_rules("mlp.experts", "mixers.1.experts", count, EXPERT_NAMES)
        return decoder_rules(model, [*NORMS, *ATTENTION, rename("mlp.gate", "mixers.1.router"), *experts])
