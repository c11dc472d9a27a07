"""Jamba (Lieber et al. 2024, arXiv:2403.19887): mostly Mamba with norms, every so often softmax without positions, or experts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from slipstream.interop.hf.decoder import (
    ATTENTION,
    gated_mlp,
    heads,
    layers_by_name,
    model_config,
    part,
    pattern,
    sizes,
    stem,
    their_gated_mlp,
    their_heads,
    their_sizes,
    values,
)
from slipstream.interop.hf.experts import EXPERT_NAMES, expert_rules, feedforwards, mixture, their_mixture
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.state_space import JAMBA, RUN_AND_TRAINED, selective, their_selective
from slipstream.interop.hf.weights import Rule, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

NORMS = [rename("input_layernorm", "norms.0"), rename("pre_ff_layernorm", "norms.1")]


class Jamba(Family):
    model_types = ("jamba",)
    architecture = "JambaForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf)
        attention = part("attention", heads(hf), {"rope_base": "none"})
        mamba = part("mamba", selective(hf, JAMBA), norms=True, norm_eps=about["norm_eps"])
        mlp = gated_mlp(hf)
        moe = mixture(hf, "num_experts", "intermediate_size", about["n_layers"], normalised=False)
        full, sparse = _places(hf, "attn_layer", 8, 4), _places(hf, "expert_layer", 2, 1)
        hf.ignore("mamba_inner_layernorms", "num_local_experts", *RUN_AND_TRAINED)
        several = moe.settings["n_experts"] > 1
        blocks = (
            (attention if i in full else mamba, moe if several and i in sparse else mlp)
            for i in range(about["n_layers"])
        )
        return model_config(pattern(blocks), about)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers, (dense, sparse) = layers_by_name(model, "mamba", "attention"), feedforwards(model, some=False)
        one = {"num_experts": 1, "num_experts_per_tok": 1}
        return {
            **their_sizes(model),
            **their_heads(layers["attention"].values()),
            **their_selective(layers["mamba"].values(), JAMBA),
            **(their_gated_mlp(dense.values()) if dense else {}),
            **(their_mixture(sparse.values(), "num_experts", "intermediate_size") if sparse else one),
            **_their_places(layers["attention"], "attn_layer", model.config.n_layers),
            **_their_places(sparse or [0], "expert_layer", model.config.n_layers),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers, (dense, sparse) = layers_by_name(model, "mamba", "attention"), feedforwards(model, some=False)
        count = max((values(m)["n_experts"] for m in sparse.values()), default=0)
        experts = expert_rules("feed_forward.experts", "mixers.1.experts", count, EXPERT_NAMES) if count else []
        return [
            *stem(norm="final_layernorm"),
            *in_blocks(NORMS, range(model.config.n_layers)),
            *in_blocks([rename("mamba", "mixers.0")], layers["mamba"]),
            *in_blocks(ATTENTION, layers["attention"]),
            *in_blocks([rename("feed_forward", "mixers.1")], dense),
            *in_blocks([rename("feed_forward.router", "mixers.1.router"), *experts], sparse),
        ]


def _places(hf: Fields, kind: str, period: int, offset: int) -> range:
    """The numbers of the layers of a kind."""
    period, offset = hf.whole(f"{kind}_period", period), hf.whole(f"{kind}_offset", offset, least=0)
    return range(offset, hf.whole("num_hidden_layers"), period)


def _their_places(layers: Collection[int], kind: str, n_layers: int) -> dict[str, int]:
    """The inverse, by the first two; whether others follow is seen when it is read back."""
    first, second = [*layers, n_layers + min(layers)][:2]
    return {f"{kind}_period": second - first, f"{kind}_offset": first}
