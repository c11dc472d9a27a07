"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral with a mixture of experts for a feed-forward."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    ATTENTION,
    NORMS,
    attention_layers,
    decoder_rules,
    heads,
    model_config,
    part,
    pattern,
    rope,
    second_mixers,
    sizes,
    their_heads,
    their_rope,
    their_sizes,
    their_windows,
    values,
)
from slipstream.interop.hf.experts import expert_rules, mixture, their_mixture
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

BASE = 1e6  # of rotary positions, where settings do not say


class Mixtral(Family):
    model_types = ("mixtral",)
    architecture = "MixtralForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about, window = sizes(hf, eps=1e-5), hf.whole("sliding_window", None)
        attention = part("sliding_window" if window else "attention", heads(hf), rope(hf, base=BASE), window=window)
        moe = mixture(hf, "num_local_experts", "intermediate_size", about["n_layers"])
        return model_config(pattern([(attention, moe)]), about)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        attention = attention_layers(model, "attention", "sliding_window")
        return {
            **their_sizes(model),
            **their_heads(attention),
            **their_mixture(second_mixers(model, "moe"), "num_local_experts", "intermediate_size"),
            "rope_parameters": their_rope(attention),
            "sliding_window": their_windows(attention)["sliding_window"],
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        count = values(next(second_mixers(model, "moe")))["n_experts"]
        experts = expert_rules("block_sparse_moe.experts", "mixers.1.experts", count, ("w1", "w3", "w2"))
        router = rename("block_sparse_moe.gate", "mixers.1.router")
        return decoder_rules(model, [*NORMS, *ATTENTION, router, *experts])
