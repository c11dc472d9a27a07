"""MiniMax-01 and M1 (MiniMax 2025, arXiv:2501.08313): Lightning attention, softmax and experts, on a stream that is normed itself.

Transformers has one pair of factors for each of three kinds of layers; here they must be the same, as in what was published.
"""

from __future__ import annotations

from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.hf.decoder import (
    ATTENTION,
    NORMS,
    STEM,
    heads,
    layers_by_name,
    model_config,
    part,
    pattern,
    rope,
    second_mixers,
    sizes,
    their_heads,
    their_rope,
    their_sizes,
    values,
)
from slipstream.interop.hf.experts import expert_rules, mixture, their_mixture
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.gated_delta import KINDS, their_layer_kinds
from slipstream.interop.hf.weights import Rule, in_blocks, rename, renames
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import Part

BASE = 1e6  # of rotary positions, where settings do not say
OF_LAYERS = ("full_attn", "linear_attn", "mlp")  # which have factors of their own
TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")  # computed from the settings, but in the files
LIGHTNING = renames("self_attn", "mixers.0", "qkv_proj out_proj output_gate norm")


class MiniMax(Family):
    model_types = ("minimax",)
    architecture = "MiniMaxForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about, head = sizes(hf, eps=1e-5), heads(hf)
        n = about["n_layers"]
        hf.only("sliding_window", None)
        hf.only("rotary_dim", head["head_dim"])
        hf.ignore("block_size")
        softmax = part("attention", head, rope(hf, base=BASE))
        moe = mixture(hf, "num_local_experts", "intermediate_size", n)
        kinds = hf.words("layer_types", KINDS, n, [KINDS[(i + 1) % 2] for i in range(n)])
        layers = [softmax if kind == "full_attention" else _lightning(head, i, n) for i, kind in enumerate(kinds)]
        return model_config(
            pattern((layer, moe) for layer in layers),
            about,
            norm_place="stream",
            carry_scale=_one_factor(hf, "alpha"),
            residual_scale=_one_factor(hf, "beta"),
        )

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers, moes = layers_by_name(model, "lightning_attention", "attention"), second_mixers(model, "moe")
        attention, c = list(layers["attention"].values()), model.config
        return {
            **their_sizes(model),
            **their_heads(attention),
            **their_mixture(moes, "num_local_experts", "intermediate_size"),
            "rope_parameters": their_rope(attention),
            "layer_types": their_layer_kinds(layers, "lightning_attention"),
            **{f"{kind}_alpha_factor": c.carry_scale for kind in OF_LAYERS},
            **{f"{kind}_beta_factor": c.residual_scale for kind in OF_LAYERS},
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers = layers_by_name(model, "lightning_attention", "attention")
        count = values(next(second_mixers(model, "moe")))["n_experts"]
        experts = expert_rules("block_sparse_moe.experts", "mixers.1.experts", count, ("w1", "w3", "w2"))
        router = rename("block_sparse_moe.gate", "mixers.1.router")
        return [
            *STEM,
            *in_blocks([*NORMS, router, *experts], range(model.config.n_layers)),
            *in_blocks(LIGHTNING, layers["lightning_attention"]),
            *in_blocks(ATTENTION, layers["attention"]),
        ]

    def surplus(self, name: str, config: ModelConfig) -> bool:
        return name.endswith(TABLES) or super().surplus(name, config)


def _lightning(head: dict[str, Any], layer: int, n_layers: int) -> Part:
    """Its pace follows from where it stands."""
    depth = layer / (n_layers - 1 + 1e-5)
    return part("lightning_attention", n_heads=head["n_heads"], head_dim=head["head_dim"], depth=depth)


def _one_factor(hf: Fields, name: str) -> float:
    found = {float(hf.number(f"{kind}_{name}_factor", 1)) for kind in OF_LAYERS}
    if len(found) > 1:
        raise InputError(f"{hf.owner} has several {name}_factors ({found}); slipstream has one for all layers")
    return found.pop()
