"""RecurrentGemma (Botev et al. 2024, arXiv:2404.07839): Griffin, two layers of RG-LRU to one of attention within a window."""

from __future__ import annotations

from typing import Any

import torch

from slipstream.interop.hf.decoder import (
    biases,
    first_mixers,
    gated_mlp,
    heads,
    layers_by_name,
    model_config,
    part,
    pattern,
    rope,
    second_mixers,
    sizes,
    stem,
    their_gated_mlp,
    their_heads,
    their_rope,
    their_sizes,
    values,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule, in_blocks, rename, renames
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

KINDS = {"recurrent": "rg_lru", "attention": "sliding_window"}
GRIFFIN = ["recurrent", "recurrent", "attention"]
NORMS = [rename("temporal_pre_norm", "norms.0"), rename("channel_pre_norm", "norms.1")]
ATTENTION = [
    *renames("temporal_block", "mixers.0.qkv", "q_proj k_proj v_proj"),
    *renames("temporal_block", "mixers.0", "o_proj"),
]
RECURRENT = renames("temporal_block", "mixers.0", "linear_x linear_y linear_out conv_1d rg_lru")
MLP = renames("mlp_block", "mixers.1", "gate_proj up_proj down_proj")


class RecurrentGemma(Family):
    model_types = ("recurrent_gemma",)
    architecture = "RecurrentGemmaForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, tied=True)
        mixers = {"attention": self._attention(hf), "recurrent": self._recurrent(hf, about["d_model"])}
        mlp = gated_mlp(hf, "hidden_activation", "gelu_pytorch_tanh", bias=True)
        mlp.settings["d_ff"] //= 2  # they say the width of both halves
        hf.only("hidden_activation", "gelu_pytorch_tanh")
        hf.only("embeddings_scale_by_sqrt_dim", True)
        hf.ignore("w_init_variance_scale", "final_w_init_variance_scale")
        kinds = hf.words("block_types", KINDS, None, GRIFFIN) or GRIFFIN
        layers = [kinds[i % len(kinds)] for i in range(about["n_layers"])]
        return model_config(
            pattern((mixers[kind], mlp) for kind in layers),
            about,
            norm="rms_plus_one",
            embedding_scale=_rounded(about["d_model"] ** 0.5),
            logit_cap=float(hf.number("logits_soft_cap", 30.0)),
        )

    @staticmethod
    def _attention(hf: Fields) -> Any:
        settings = heads(hf) | rope(hf, partial=0.5) | biases(hf) | {"o_bias": True}
        return part("sliding_window", settings, window=hf.whole("attention_window_size", 2048))

    @staticmethod
    def _recurrent(hf: Fields, d_model: int) -> Any:
        width = hf.whole("lru_width", d_model)
        n_heads, conv_size = hf.whole("num_attention_heads"), hf.whole("conv1d_width", 4)
        return part("rg_lru", d_inner=None if width == d_model else width, n_heads=n_heads, conv_size=conv_size)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers = layers_by_name(model, "rg_lru", "sliding_window")
        attention, recurrent = (list(layers[name].values()) for name in ("sliding_window", "rg_lru"))
        mlp = their_gated_mlp(second_mixers(model), "hidden_activation")
        theirs = {ours: kind for kind, ours in KINDS.items()}
        turned = {"partial_rotary_factor": values(attention[0])["rope_fraction"]}
        return {
            **their_sizes(model),
            **their_heads(attention),
            **mlp,
            "intermediate_size": 2 * mlp["intermediate_size"],
            "rope_parameters": their_rope(attention) | turned,
            "attention_bias": one_of_each((values(m)["qkv_bias"] for m in attention), "qkv_bias"),
            "attention_window_size": one_of_each((values(m)["window"] for m in attention), "window"),
            "lru_width": one_of_each((values(m)["d_inner"] or model.config.d_model for m in recurrent), "d_inner"),
            "conv1d_width": one_of_each((values(m)["conv_size"] for m in recurrent), "conv_size"),
            "logits_soft_cap": model.config.logit_cap,
            "block_types": [theirs[mixer.name] for mixer in first_mixers(model)],
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers = layers_by_name(model, "rg_lru", "sliding_window")
        return [
            *stem(norm="final_norm"),
            *in_blocks([*NORMS, *MLP], range(model.config.n_layers)),
            *in_blocks(RECURRENT, layers["rg_lru"]),
            *in_blocks(ATTENTION, layers["sliding_window"]),
        ]


def _rounded(scale: float) -> float:
    """As transformers keeps it, in bfloat16."""
    return float(torch.tensor(scale, dtype=torch.bfloat16))
