"""Qwen3.5, dense, and its text alone (Qwen Team 2026): as Qwen3-Next, without experts, and with projections that stand apart.

Published files also have a network for images, and layers that predict several tokens at once: both are left unread. Rotary
positions of text are the same along all three axes that images have, so that their interleaving changes nothing.
"""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    GATED_MLP,
    NORMS,
    STEM,
    gated_mlp,
    layers_by_name,
    model_config,
    pattern,
    second_mixers,
    sizes,
    their_gated_mlp,
    their_sizes,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.gated_delta import (
    delta,
    delta_rules,
    gated_attention,
    gated_attention_rules,
    layer_kinds,
    their_delta,
    their_gated_attention,
    their_layer_kinds,
)
from slipstream.interop.hf.weights import Rule, cut, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel


class Qwen35(Family):
    model_types = ("qwen3_5_text", "qwen3_5")
    architecture = "Qwen3_5ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        if not hf.has("text_config"):
            return self._text(hf)
        text = hf.table_of("text_config")
        text.table.setdefault("tie_word_embeddings", hf.flag("tie_word_embeddings", False))
        hf.ignore(*(name for name in hf.table if name.startswith(("vision_", "image_", "video_", "language_model_"))))
        config = self._text(text)
        text.finish()
        return config

    @staticmethod
    def _text(hf: Fields) -> ModelConfig:
        hf.only("attn_output_gate", True)
        hf.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
        about = sizes(hf)
        n, eps = about["n_layers"], about["norm_eps"]
        mixers = {"linear_attention": delta(hf, eps), "full_attention": gated_attention(hf, eps)}
        mlp = gated_mlp(hf)
        return model_config(pattern((mixers[kind], mlp) for kind in layer_kinds(hf, n)), about, norm="rms_plus_one")

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers = layers_by_name(model, "gated_deltanet", "attention")
        return {
            **their_sizes(model),
            **their_delta(layers["gated_deltanet"].values()),
            **their_gated_attention(layers["attention"].values()),
            **their_gated_mlp(second_mixers(model)),
            "layer_types": their_layer_kinds(layers, "gated_deltanet"),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers = layers_by_name(model, "gated_deltanet", "attention")
        return [
            *STEM,
            *in_blocks([*NORMS, *GATED_MLP], range(model.config.n_layers)),
            *in_blocks(self._delta_rules(next(iter(layers["gated_deltanet"].values()))), layers["gated_deltanet"]),
            *in_blocks(gated_attention_rules(next(iter(layers["attention"].values()))), layers["attention"]),
        ]

    @staticmethod
    def _delta_rules(mixer: Any) -> list[Rule]:
        k, v = mixer.n_heads * mixer.head_dim, mixer.n_v_heads * mixer.v_head_dim
        return [
            cut("linear_attn.in_proj_qkv", [f"mixers.0.{n}_proj" for n in "qkv"], (k, k, v)),
            rename("linear_attn.in_proj_z", "mixers.0.g_proj"),
            *(rename(f"linear_attn.in_proj_{n}", f"mixers.0.{n}_proj") for n in "ab"),
            *delta_rules(mixer),
        ]

    def spelling(self, name: str) -> str:
        """Beside a network for images, the text's stands one deeper."""
        return name.replace("model.language_model.", "model.", 1)

    def surplus(self, name: str, config: ModelConfig) -> bool:
        return name.startswith(("mtp.", "model.visual.")) or super().surplus(name, config)
