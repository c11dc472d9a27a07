"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): windows in every other layer, capped logits, norms around what a mixer does.

Norms keep their weights less one, and embeddings are multiplied by the root of their width.
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
    values,
    windows,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel


class Gemma2(Family):
    model_types = ("gemma2",)
    architecture = "Gemma2ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about, head = sizes(hf, tied=True), heads(hf, 256)
        by_default = [("sliding_attention", "full_attention")[i % 2] for i in range(about["n_layers"])]
        kinds = hf.words("layer_types", WINDOWED, about["n_layers"], by_default)
        settings = head | rope(hf) | biases(hf) | {"qk_scale": qk_scale(hf, head["head_dim"])}
        settings["softcap"] = hf.number("attn_logit_softcapping", None)
        mlp = gated_mlp(hf, "hidden_activation", default="gelu_pytorch_tanh")
        hf.only("use_bidirectional_attention", False)
        hf.ignore("hidden_act")
        layers = windows(hf, kinds, hf.whole("sliding_window", 4096))
        return model_config(
            pattern((part(name, settings, window), mlp) for name, window in layers),
            about,
            norm="rms_plus_one",
            norm_place="around",
            embedding_scale=about["d_model"] ** 0.5,
            logit_cap=hf.number("final_logit_softcapping", None),
        )

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        attention = attention_layers(model, "attention", "sliding_window")
        head = their_heads(attention)
        return {
            **their_sizes(model),
            **head,
            **their_gated_mlp(second_mixers(model), "hidden_activation"),
            **their_windows(attention),
            **their_biases(attention),
            "rope_parameters": their_rope(attention),
            "query_pre_attn_scalar": their_qk_scale(attention, head["head_dim"]),
            "attn_logit_softcapping": one_of_each((values(m)["softcap"] for m in attention), "softcap"),
            "final_logit_softcapping": model.config.logit_cap,
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        return decoder_rules(model, [*AROUND, *ATTENTION, *GATED_MLP])
