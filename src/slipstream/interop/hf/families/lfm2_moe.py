"""LFM2 with experts (Liquid AI 2025, arXiv:2511.23404): LFM2, with a mixture in all layers but the first."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    gated_mlp,
    layers_by_name,
    model_config,
    pattern,
    sizes,
    stem,
    their_gated_mlp,
    their_sizes,
    values,
)
from slipstream.interop.hf.experts import expert_rules, feedforwards, mixture, their_dense_first, their_mixture
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.short_conv import (
    ATTENTION,
    CONVOLUTION,
    EPS,
    GATED,
    KINDS,
    NORMS,
    mixers,
    their_mixers,
    tied,
)
from slipstream.interop.hf.weights import Rule, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import Part


class LFM2MoE(Family):
    model_types = ("lfm2_moe",)
    architecture = "Lfm2MoeForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, eps=1e-5, eps_name=EPS)
        about["tie_embeddings"] = tied(hf)
        n, of_kind = about["n_layers"], mixers(hf, about["norm_eps"])
        dense, moe, mlp = hf.whole("num_dense_layers", 2, least=0), self._mixture(hf, n), gated_mlp(hf)
        kinds = hf.words("layer_types", KINDS, n)
        hf.ignore("theta")
        return model_config(pattern((of_kind[kind], mlp if i < dense else moe) for i, kind in enumerate(kinds)), about)

    @staticmethod
    def _mixture(hf: Fields, n_layers: int) -> Part:
        return mixture(
            hf,
            "num_experts",
            "moe_intermediate_size",
            n_layers,
            gate="sigmoid",
            normalised=hf.flag("norm_topk_prob", True),
            scale=float(hf.number("routed_scaling_factor", 1.0)),
            selection_bias=hf.flag("use_expert_bias", True),
        )

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers, (dense, sparse) = layers_by_name(model, "lfm2_conv", "attention"), feedforwards(model)
        moes = list(sparse.values())
        names = {"norm_topk_prob": "normalised", "routed_scaling_factor": "scale", "use_expert_bias": "selection_bias"}
        return {
            **their_sizes(model, EPS),
            **their_mixers(layers["attention"].values(), layers["lfm2_conv"].values()),
            **(their_gated_mlp(dense.values()) if dense else {"intermediate_size": model.config.d_model}),
            **their_mixture(moes, "num_experts", "moe_intermediate_size"),
            **{theirs: one_of_each((values(m)[ours] for m in moes), ours) for theirs, ours in names.items()},
            "num_dense_layers": their_dense_first(dense),
            "layer_types": [
                "full_attention" if i in layers["attention"] else "conv" for i in range(model.config.n_layers)
            ],
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers, (dense, sparse) = layers_by_name(model, "lfm2_conv", "attention"), feedforwards(model)
        count = values(next(iter(sparse.values())))["n_experts"]
        moe = [
            rename("feed_forward.gate.weight", "mixers.1.router.weight"),
            rename("feed_forward.expert_bias", "mixers.1.selection_bias"),
            *expert_rules("feed_forward.experts", "mixers.1.experts", count, ("w1", "w3", "w2")),
        ]
        return [
            *stem(norm="embedding_norm"),
            *in_blocks(NORMS, range(model.config.n_layers)),
            *in_blocks(GATED, dense),
            *in_blocks(moe, sparse),
            *in_blocks(CONVOLUTION, layers["lfm2_conv"]),
            *in_blocks(ATTENTION, layers["attention"]),
        ]
