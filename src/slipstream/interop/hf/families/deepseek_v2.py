"""DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434): latent attention, and many narrow experts beside shared ones."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    gated_mlp,
    model_config,
    part,
    pattern,
    sizes,
    their_gated_mlp,
    their_sizes,
    values,
)
from slipstream.interop.hf.experts import feedforwards, mixture, their_dense_first, their_mixture
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.latent import latent_attention, latent_rules, their_latent_attention
from slipstream.interop.hf.weights import Rule
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel


class DeepseekV2(Family):
    model_types = ("deepseek_v2",)
    architecture = "DeepseekV2ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about, attention = sizes(hf), part("mla", latent_attention(hf))
        hf.only("mlp_bias", False)
        hf.only("norm_topk_prob", False)
        hf.only("scoring_func", "softmax")
        hf.only("moe_layer_freq", 1)
        hf.ignore("aux_loss_alpha", "seq_aux", "ep_size")
        dense = hf.whole("first_k_dense_replace", 0, least=0)
        moe = mixture(
            hf,
            "n_routed_experts",
            "moe_intermediate_size",
            about["n_layers"],
            n_shared_experts=hf.whole("n_shared_experts", 2),
            normalised=False,
            scale=float(hf.number("routed_scaling_factor", 1.0)),
            **self._groups(hf),
        )
        mlp = gated_mlp(hf)
        return model_config(pattern((attention, mlp if i < dense else moe) for i in range(about["n_layers"])), about)

    @staticmethod
    def _groups(hf: Fields) -> dict[str, Any]:
        """Experts are chosen among all, or among those of the groups with the largest single scores."""
        groups, chosen = hf.whole("n_group", 1), hf.whole("topk_group", 1)
        if hf.word("topk_method", ("greedy", "group_limited_greedy"), "greedy") == "greedy":
            return {}
        return {"n_groups": groups, "top_groups": chosen, "group_members": 1}

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        dense, sparse = feedforwards(model)
        first = values(next(iter(sparse.values())))
        grouped = first["n_groups"] > 1
        return {
            **their_sizes(model),
            **their_latent_attention(model),
            **(their_gated_mlp(dense.values()) if dense else {"intermediate_size": model.config.d_model}),
            **their_mixture(sparse.values(), "n_routed_experts", "moe_intermediate_size"),
            "n_shared_experts": one_of_each(
                (values(m)["n_shared_experts"] for m in sparse.values()), "n_shared_experts"
            ),
            "first_k_dense_replace": their_dense_first(dense),
            "routed_scaling_factor": first["scale"],
            "topk_method": "group_limited_greedy" if grouped else "greedy",
            "n_group": first["n_groups"] if grouped else None,
            "topk_group": first["top_groups"] if grouped else None,
            "norm_topk_prob": False,
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        return latent_rules(model)
