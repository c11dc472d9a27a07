"""Bamba (IBM et al. 2024): mostly Mamba-2, a few layers of softmax attention that turns half of each head."""

from __future__ import annotations

from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.hf.decoder import (
    ATTENTION,
    biases,
    gated_mlp,
    heads,
    layers_by_name,
    mlp_bias,
    model_config,
    part,
    pattern,
    rope,
    second_mixers,
    sizes,
    stem,
    their_biases,
    their_gated_mlp,
    their_heads,
    their_rope,
    their_sizes,
    values,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.state_space import BAMBA, RUN_AND_TRAINED, ssd, their_ssd
from slipstream.interop.hf.weights import Rule, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

HALF = 0.5  # of each head is turned, whatever settings say
EVERYWHERE = [
    rename("input_layernorm", "norms.0"),
    rename("pre_ff_layernorm", "norms.1"),
    rename("feed_forward", "mixers.1"),
]


class Bamba(Family):
    model_types = ("bamba",)
    architecture = "BambaForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, eps=1e-5)
        turned = rope(hf, partial=HALF)
        if turned.get("rope_fraction") != HALF:
            raise InputError(
                f"{hf.owner}: models of this family turn half of each head, not {turned.get('rope_fraction', 1)}"
            )
        attention = part("attention", heads(hf), turned, biases(hf))
        layer = ssd(hf, BAMBA, n_heads=128, n_groups=1, d_state=256, conv_size=4)
        mamba = part("mamba2", layer, norm_eps=about["norm_eps"])
        mlp = gated_mlp(hf, **mlp_bias(hf))
        full = hf.wholes("attn_layer_indices", [])
        hf.ignore("mamba_chunk_size", "z_loss_coefficient", "attn_rotary_emb", *RUN_AND_TRAINED)
        return model_config(pattern((attention if i in full else mamba, mlp) for i in range(about["n_layers"])), about)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers, mlps = layers_by_name(model, "mamba2", "attention"), list(second_mixers(model))
        attention = list(layers["attention"].values())
        return {
            **their_sizes(model),
            **their_heads(attention),
            **their_biases(attention),
            **their_ssd(layers["mamba2"].values(), BAMBA),
            **their_gated_mlp(mlps),
            "mlp_bias": one_of_each((values(m)["bias"] for m in mlps), "bias"),
            "rope_parameters": {
                **their_rope(attention),
                "partial_rotary_factor": values(attention[0])["rope_fraction"],
            },
            "attn_layer_indices": list(layers["attention"]),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers = layers_by_name(model, "mamba2", "attention")
        return [
            *stem(norm="final_layernorm"),
            *in_blocks(EVERYWHERE, range(model.config.n_layers)),
            *in_blocks([rename("mamba", "mixers.0")], layers["mamba2"]),
            *in_blocks(ATTENTION, layers["attention"]),
        ]
