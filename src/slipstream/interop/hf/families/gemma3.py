"""Gemma 3, text (Gemma Team 2025, arXiv:2503.19786): as Gemma 2, with norms of queries and keys instead of caps, five layers with
windows to one without, and faster rotations in those with windows.
"""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    AROUND,
    ATTENTION,
    GATED_MLP,
    WINDOWED,
    attention_layers,
    biases,
    decoder_rules,
    gated_mlp,
    heads,
    model_config,
    part,
    pattern,
    qk_scale,
    rope,
    second_mixers,
    sizes,
    their_biases,
    their_gated_mlp,
    their_heads,
    their_qk_scale,
    their_rope,
    their_sizes,
    their_windows,
    windows,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

GLOBAL_BASE, LOCAL_BASE = 1e6, 1e4


class Gemma3(Family):
    model_types = ("gemma3_text",)
    architecture = "Gemma3ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about, head = sizes(hf, tied=True), heads(hf, 256)
        every = hf.whole("sliding_window_pattern", hf.whole("_sliding_window_pattern", 6))
        by_default = [
            "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(about["n_layers"])
        ]
        kinds = hf.words("layer_types", WINDOWED, about["n_layers"], by_default)
        settings = head | biases(hf) | {"qk_scale": qk_scale(hf, head["head_dim"])}
        settings |= {"qk_norm": "plus_one", "qk_norm_eps": about["norm_eps"]}
        turns = {"attention": rope(hf, "full_attention", GLOBAL_BASE), "sliding_window": self._local_rope(hf)}
        mlp = gated_mlp(hf, "hidden_activation", default="gelu_pytorch_tanh")
        hf.only("use_bidirectional_attention", False)
        hf.only("attn_logit_softcapping", None)
        hf.ignore("hidden_act")
        layers = windows(hf, kinds, hf.whole("sliding_window", 4096))
        return model_config(
            pattern((part(name, settings, turns[name], window), mlp) for name, window in layers),
            about,
            norm="rms_plus_one",
            norm_place="around",
            embedding_scale=about["d_model"] ** 0.5,
            logit_cap=hf.number("final_logit_softcapping", None),
        )

    @staticmethod
    def _local_rope(hf: Fields) -> dict[str, Any]:
        """Without scaling, and of a base of its own, in old settings and in new ones."""
        local = float(hf.number("rope_local_base_freq", LOCAL_BASE))
        if hf.has("rope_parameters"):
            return rope(hf, "sliding_attention", local)
        return {"rope_base": local}

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        attention = attention_layers(model, "attention", "sliding_window")
        kinds = {kind: [m for m in attention if m.name == ours] for kind, ours in WINDOWED.items()}
        head = their_heads(attention)
        return {
            **their_sizes(model),
            **head,
            **their_gated_mlp(second_mixers(model), "hidden_activation"),
            **their_windows(attention),
            **their_biases(attention),
            "rope_parameters": {kind: their_rope(layers) for kind, layers in kinds.items() if layers},
            "query_pre_attn_scalar": their_qk_scale(attention, head["head_dim"]),
            "final_logit_softcapping": model.config.logit_cap,
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        return decoder_rules(model, [*AROUND, *ATTENTION, *GATED_MLP])
