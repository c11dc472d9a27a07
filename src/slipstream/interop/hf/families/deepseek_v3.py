"""DeepSeek-V3 and R1 (DeepSeek-AI 2024, arXiv:2412.19437): as V2, with experts chosen by sigmoids and a bias that balances them.

The layers that predict further tokens (MTP) are in the files but not in this model, as in transformers. The released files are
in FP8, which is refused as any quantised checkpoint is.
"""

from __future__ import annotations

import re
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


class DeepseekV3(Family):
    model_types = ("deepseek_v3",)
    architecture = "DeepseekV3ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about, attention = sizes(hf), part("mla", latent_attention(hf))
        hf.only("rope_interleave", True)
        hf.only("scoring_func", "sigmoid")
        hf.only("topk_method", "noaux_tc")
        hf.only("moe_layer_freq", 1)
        hf.ignore("num_nextn_predict_layers", "num_mtp_layers", "aux_loss_alpha", "seq_aux", "ep_size")
        dense = hf.whole("first_k_dense_replace", 3, least=0)
        moe = mixture(
            hf,
            "n_routed_experts",
            "moe_intermediate_size",
            about["n_layers"],
            n_shared_experts=hf.whole("n_shared_experts", 1),
            gate="sigmoid",
            normalised=hf.flag("norm_topk_prob", True),
            scale=float(hf.number("routed_scaling_factor", 2.5)),
            n_groups=hf.whole("n_group", 8),
            top_groups=hf.whole("topk_group", 4),
            selection_bias=True,
        )
        mlp = gated_mlp(hf)
        return model_config(pattern((attention, mlp if i < dense else moe) for i in range(about["n_layers"])), about)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        dense, sparse = feedforwards(model)
        first = values(next(iter(sparse.values())))
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
            "norm_topk_prob": first["normalised"],
            "n_group": first["n_groups"],
            "topk_group": first["top_groups"],
            "rope_interleave": True,
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        return latent_rules(model)

    def surplus(self, name: str, config: ModelConfig) -> bool:
        """Layers after the last are those that predict further tokens."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return super().surplus(name, config) or bool(layer and int(layer[1]) >= config.n_layers)
