"""Qwen 3 with experts (Yang et al. 2025, arXiv:2505.09388): Qwen 3, with a mixture of experts in all or some of its layers."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    ATTENTION,
    GATED_MLP,
    NORMS,
    attention_layers,
    biases,
    decoder_rules,
    gated_mlp,
    heads,
    model_config,
    part,
    pattern,
    rope,
    sizes,
    their_biases,
    their_gated_mlp,
    their_heads,
    their_rope,
    their_sizes,
    their_windows,
    values,
)
from slipstream.interop.hf.experts import (
    EXPERT_NAMES,
    expert_rules,
    feedforwards,
    mixture,
    sparse_layers,
    their_mixture,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel


class Qwen3Moe(Family):
    model_types = ("qwen3_moe",)
    architecture = "Qwen3MoeForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about, window = sizes(hf), self._window(hf)
        norms = {"qk_norm": True, "qk_norm_eps": about["norm_eps"], "window": window}
        attention = part("sliding_window" if window else "attention", heads(hf), rope(hf), biases(hf), norms)
        normalised, count = (
            hf.flag("norm_topk_prob", False),
            "num_experts" if hf.has("num_experts") else "num_local_experts",
        )
        moe = mixture(hf, count, "moe_intermediate_size", about["n_layers"], normalised=normalised)
        mlp = gated_mlp(hf)
        sparse = sparse_layers(hf, about["n_layers"])
        return model_config(pattern((attention, moe if here else mlp) for here in sparse), about)

    @staticmethod
    def _window(hf: Fields) -> int | None:
        """All layers have one, or none."""
        window = hf.whole("sliding_window", 4096)
        hf.ignore("max_window_layers")
        return window if hf.flag("use_sliding_window", False) else None

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        attention = attention_layers(model, "attention", "sliding_window")
        dense, sparse = feedforwards(model)
        window = their_windows(attention)["sliding_window"]
        mlp = their_gated_mlp(dense.values()) if dense else {"intermediate_size": model.config.d_model}
        return {
            **their_sizes(model),
            **their_heads(attention),
            **mlp,
            **their_mixture(sparse.values(), "num_experts", "moe_intermediate_size"),
            **their_biases(attention),
            "rope_parameters": their_rope(attention),
            "norm_topk_prob": one_of_each((values(m)["normalised"] for m in sparse.values()), "normalised"),
            "mlp_only_layers": list(dense),
            "decoder_sparse_step": 1,
            "use_sliding_window": window is not None,
            "sliding_window": window,
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        _, sparse = feedforwards(model)
        experts = expert_rules(
            "mlp.experts", "mixers.1.experts", values(next(iter(sparse.values())))["n_experts"], EXPERT_NAMES
        )
        return decoder_rules(model, [*NORMS, *ATTENTION, *GATED_MLP, rename("mlp.gate", "mixers.1.router"), *experts])
