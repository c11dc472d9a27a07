"""Qwen3-Next (Qwen Team 2025): three layers of Gated DeltaNet to one of gated softmax attention, and many small experts.

The extra layers that predict several tokens at once (mtp) are left unread, as in transformers.
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
    sizes,
    their_gated_mlp,
    their_sizes,
    values,
)
from slipstream.interop.hf.experts import (
    feedforwards,
    shared_mixture,
    shared_mixture_rules,
    sparse_layers,
    their_shared_mixture,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.gated_delta import (
    by_head,
    delta,
    delta_rules,
    gated_attention,
    gated_attention_rules,
    layer_kinds,
    their_delta,
    their_gated_attention,
    their_layer_kinds,
)
from slipstream.interop.hf.weights import Rule, in_blocks
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel


class Qwen3Next(Family):
    model_types = ("qwen3_next",)
    architecture = "Qwen3NextForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf)
        hf.only("use_sliding_window", False)
        n, eps = about["n_layers"], about["norm_eps"]
        mixers = {"linear_attention": delta(hf, eps), "full_attention": gated_attention(hf, eps)}
        moe, mlp = shared_mixture(hf, n, hf.flag("norm_topk_prob", True)), gated_mlp(hf)
        blocks = zip(layer_kinds(hf, n), sparse_layers(hf, n))
        return model_config(
            pattern((mixers[kind], moe if sparse else mlp) for kind, sparse in blocks), about, norm="rms_plus_one"
        )

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers, (dense, sparse) = layers_by_name(model, "gated_deltanet", "attention"), feedforwards(model)
        return {
            **their_sizes(model),
            **their_delta(layers["gated_deltanet"].values()),
            **their_gated_attention(layers["attention"].values()),
            **(their_gated_mlp(dense.values()) if dense else {"intermediate_size": model.config.d_model}),
            **their_shared_mixture(sparse.values()),
            "norm_topk_prob": one_of_each((values(m)["normalised"] for m in sparse.values()), "normalised"),
            "layer_types": their_layer_kinds(layers, "gated_deltanet"),
            "mlp_only_layers": list(dense),
            "decoder_sparse_step": 1,
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers, (dense, sparse) = layers_by_name(model, "gated_deltanet", "attention"), feedforwards(model)
        return [
            *STEM,
            *in_blocks(NORMS, range(model.config.n_layers)),
            *in_blocks(self._delta_rules(next(iter(layers["gated_deltanet"].values()))), layers["gated_deltanet"]),
            *in_blocks(gated_attention_rules(next(iter(layers["attention"].values()))), layers["attention"]),
            *in_blocks(GATED_MLP, dense),
            *in_blocks(shared_mixture_rules(next(iter(sparse.values()))), sparse),
        ]

    @staticmethod
    def _delta_rules(mixer: Any) -> list[Rule]:
        """Everything of one key head stands together, the value heads that share it included."""
        group = mixer.n_v_heads // mixer.n_heads
        k, v = mixer.head_dim, group * mixer.v_head_dim
        qkvz, ba = ([f"mixers.0.{n}_proj" for n in names] for names in ("qkvg", "ba"))
        return [
            by_head("linear_attn.in_proj_qkvz", qkvz, mixer.n_heads, (k, k, v, v)),
            by_head("linear_attn.in_proj_ba", ba, mixer.n_heads, (group, group)),
            *delta_rules(mixer),
        ]

    def surplus(self, name: str, config: ModelConfig) -> bool:
        return name.startswith("mtp.") or super().surplus(name, config)
