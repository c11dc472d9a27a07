"""Falcon-H1 (TII 2025, arXiv:2507.22448): attention and Mamba-2 side by side in every layer, with a dozen multipliers."""

from __future__ import annotations

import math
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.hf.decoder import (
    attention_layers,
    gated_mlp,
    heads,
    mlp_bias,
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
from slipstream.interop.hf.state_space import RUN_AND_TRAINED, whole_or_auto
from slipstream.interop.hf.weights import Rule, in_blocks, rename, renames
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

MULTIPLIERS = {
    "attention_in": "attention_in_multiplier",
    "attention_out": "attention_out_multiplier",
    "key_scale": "key_multiplier",
    "ssm_in": "ssm_in_multiplier",
    "ssm_out": "ssm_out_multiplier",
}
SSM_MULTIPLIERS = ["ssm_z", "ssm_x", "ssm_B", "ssm_C", "ssm_dt"]
MLP_MULTIPLIERS = ["gate_scale", "out_scale"]
SIZES = {
    "ssm_n_groups": ("mamba_n_groups", 1),
    "ssm_d_state": ("mamba_d_state", 256),
    "ssm_conv_size": ("mamba_d_conv", 4),
}
BLOCK = [
    rename("input_layernorm", "norms.0"),
    rename("pre_ff_layernorm", "norms.1"),
    rename("feed_forward", "mixers.1"),
    rename("mamba", "mixers.0.mamba"),
    *renames("self_attn", "mixers.0.qkv", "q_proj k_proj v_proj"),
    rename("self_attn.o_proj", "mixers.0.o_proj"),
]


class FalconH1(Family):
    model_types = ("falcon_h1",)
    architecture = "FalconH1ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, eps=1e-5)
        multipliers = {ours: float(hf.number(theirs, 1.0)) for ours, theirs in MULTIPLIERS.items()}
        parts = dict(zip(SSM_MULTIPLIERS, hf.numbers("ssm_multipliers", 5, [1.0] * 5)))
        mixer = part("falcon_h1", heads(hf), rope(hf), self._ssm(hf, about["norm_eps"]), multipliers, parts)
        scales: dict[str, Any] = dict(zip(MLP_MULTIPLIERS, hf.numbers("mlp_multipliers", 2, [1.0, 1.0])))
        mlp = gated_mlp(hf, **mlp_bias(hf), **scales)
        for name in ("attention_bias", "mamba_proj_bias", "projectors_bias"):
            hf.only(name, False)
        hf.only("mamba_conv_bias", True)
        hf.ignore("mamba_chunk_size", "mamba_use_mlp", "mlp_expansion_factor", "attn_layer_indices", *RUN_AND_TRAINED)
        return model_config(
            pattern([(mixer, mlp)]),
            about,
            embedding_scale=float(hf.number("embedding_multiplier", 1.0)),
            logit_scale=float(hf.number("lm_head_multiplier", 1.0)),
        )

    @staticmethod
    def _ssm(hf: Fields, norm_eps: float) -> dict[str, Any]:
        by_expand = hf.whole("mamba_expand", 2) * hf.whole("hidden_size")
        inner, n_heads = hf.whole("mamba_d_ssm", by_expand), hf.whole("mamba_n_heads", 128)
        if n_heads * whole_or_auto(hf, "mamba_d_head", inner // n_heads) != inner:
            raise InputError(
                f"{hf.owner}: mamba_n_heads {n_heads} of mamba_d_head are not mamba_d_ssm {inner} together"
            )
        if hf.numbers("time_step_limit", 2, [0.0, math.inf]) != [0.0, math.inf]:
            raise InputError(
                f"{hf.owner} limits the step size (time_step_limit), which slipstream does not support here"
            )
        before, normed = hf.flag("mamba_norm_before_gate", True), hf.flag("mamba_rms_norm", False)
        return {
            "ssm_d_inner": inner,
            "ssm_heads": n_heads,
            **{ours: hf.whole(theirs, default) for ours, (theirs, default) in SIZES.items()},
            "ssm_norm": ("before_gate" if before else "after_gate") if normed else None,
            "ssm_norm_eps": norm_eps if normed else None,
        }

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers: list[Any] = attention_layers(model, "falcon_h1")
        mlps = list(second_mixers(model))

        def same(names: list[str], mixers: list[Any]) -> list[Any]:
            return [one_of_each((values(m)[name] for m in mixers), name) for name in names]

        inner = one_of_each((len(m.mamba.D) * m.mamba.head_dim for m in layers), "ssm_d_inner")
        n_heads = one_of_each((len(m.mamba.D) for m in layers), "ssm_heads")
        (norm,) = same(["ssm_norm"], layers)
        return {
            **their_sizes(model),
            **their_heads(layers),
            **their_gated_mlp(mlps),
            "rope_parameters": their_rope(layers),
            "mlp_bias": one_of_each((values(m)["bias"] for m in mlps), "bias"),
            "mlp_multipliers": same(MLP_MULTIPLIERS, mlps),
            "mamba_d_ssm": inner,
            "mamba_n_heads": n_heads,
            "mamba_d_head": inner // n_heads,
            **dict(zip((theirs for theirs, _ in SIZES.values()), same(list(SIZES), layers))),
            "mamba_rms_norm": norm != "none",
            "mamba_norm_before_gate": norm != "after_gate",
            **dict(zip(MULTIPLIERS.values(), same(list(MULTIPLIERS), layers))),
            "ssm_multipliers": same(SSM_MULTIPLIERS, layers),
            "embedding_multiplier": model.config.embedding_scale,
            "lm_head_multiplier": model.config.logit_scale,
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        return [*stem(norm="final_layernorm"), *in_blocks(BLOCK, range(model.config.n_layers))]
