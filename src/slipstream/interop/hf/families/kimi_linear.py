"""Kimi Linear (Kimi Team 2025, arXiv:2510.26692): three layers of KDA to one of latent attention without positions, and experts."""

from __future__ import annotations

import re
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.hf.decoder import (
    GATED_MLP,
    NORMS,
    STEM,
    gated_mlp,
    layers_by_name,
    model_config,
    part,
    pattern,
    sizes,
    their_gated_mlp,
    their_sizes,
    values,
)
from slipstream.interop.hf.experts import expert_rules, feedforwards, mixture, their_mixture
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.gated_delta import KINDS, their_layer_kinds
from slipstream.interop.hf.latent import WIDTHS
from slipstream.interop.hf.weights import Rule, changed, in_blocks, rename, renames
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import Part

LINEAR = {"n_heads": "linear_num_heads", "head_dim": "linear_head_dim", "conv_size": "linear_conv_kernel_dim"}
IN_A_TABLE = {"n_heads": "num_heads", "head_dim": "head_dim", "conv_size": "short_conv_kernel_size"}  # published files
DEFAULTS = {"n_heads": 32, "head_dim": 128, "conv_size": 4}
LATENT = {"kv_lora_rank": "kv_rank", "qk_nope_head_dim": "nope", "qk_rope_head_dim": "rope", "v_head_dim": "value"}
KDA = "q_proj k_proj v_proj q_conv1d k_conv1d v_conv1d f_a_proj f_b_proj dt_bias b_proj g_a_proj g_b_proj o_norm o_proj"
MLA = "q_proj q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj"


class KimiLinear(Family):
    model_types = ("kimi_linear",)
    architecture = "KimiLinearForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, eps=1e-5)
        about["context"] = hf.whole("model_max_length", about["context"])
        n, inner = about["n_layers"], hf.table_of("linear_attn_config")
        kda = {name: inner.whole(IN_A_TABLE[name], hf.whole(LINEAR[name], DEFAULTS[name])) for name in DEFAULTS}
        mixers = {"linear_attention": part("kda", kda, norm_eps=about["norm_eps"]), "full_attention": self._latent(hf)}
        kinds, sparse = self._kinds(hf, inner, n), self._sparse(hf, n)
        moe, mlp = self._mixture(hf, n), gated_mlp(hf)
        inner.finish()
        return model_config(pattern((mixers[k], moe if s else mlp) for k, s in zip(kinds, sparse)), about)

    @staticmethod
    def _latent(hf: Fields) -> Part:
        n = hf.whole("num_attention_heads")
        hf.only("num_key_value_heads", n)
        hf.only("attention_bias", False)
        hf.only("mla_use_nope", True)
        hf.ignore("head_dim", "qk_head_dim", "rope_theta", "rope_scaling", "rope_parameters")
        widths = {ours: hf.whole(theirs, default) for theirs, (ours, default) in WIDTHS.items()}
        return part("mla", widths, n_heads=n, rope_base="none")

    @staticmethod
    def _kinds(hf: Fields, inner: Fields, n_layers: int) -> list[str]:
        """By words; or by the numbers of the layers, which published files count from 1."""
        full = inner.wholes("full_attn_layers", list(range(5, n_layers + 1, 4)))
        inner.ignore("kda_layers")
        return hf.words("layer_types", KINDS, n_layers, [KINDS[i + 1 in full] for i in range(n_layers)])

    @staticmethod
    def _sparse(hf: Fields, n_layers: int) -> list[bool]:
        first = hf.whole("first_k_dense_replace", 1, least=0)
        kinds = ["dense" if i < first else "sparse" for i in range(n_layers)]
        return [k == "sparse" for k in hf.words("mlp_layer_types", ("dense", "sparse"), n_layers, kinds)]

    @staticmethod
    def _mixture(hf: Fields, n_layers: int) -> Part:
        hf.table["num_experts_per_tok"] = hf.whole("num_experts_per_token", hf.table.get("num_experts_per_tok", 8))
        hf.only("moe_router_activation_func", "sigmoid")
        hf.only("use_grouped_topk", True)
        hf.only("moe_layer_freq", 1)
        hf.only("num_nextn_predict_layers", 0)
        groups = hf.whole("num_expert_group", 1)
        chosen = hf.whole("topk_group", 1)
        return mixture(
            hf,
            "num_experts",
            "moe_intermediate_size",
            n_layers,
            n_shared_experts=hf.whole("num_shared_experts", 1),
            gate="sigmoid",
            normalised=hf.flag("moe_renormalize", True),
            scale=float(hf.number("routed_scaling_factor", 2.446)),
            n_groups=groups if groups > 1 else None,
            top_groups=chosen if groups > 1 else None,
            selection_bias=True,
        )

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers, (dense, sparse) = layers_by_name(model, "kda", "mla"), feedforwards(model)
        moe = their_mixture(sparse.values(), "num_experts", "moe_intermediate_size")
        moe["num_experts_per_token"] = moe.pop("num_experts_per_tok")
        about = their_sizes(model)
        return {
            **about,
            "model_max_length": about["max_position_embeddings"],
            **self._their_mixers(list(layers["kda"].values()), list(layers["mla"].values())),
            **(their_gated_mlp(dense.values()) if dense else {"intermediate_size": model.config.d_model}),
            **moe,
            **self._their_router(list(sparse.values())),
            "layer_types": their_layer_kinds(layers, "kda"),
            "mlp_layer_types": ["sparse" if i in sparse else "dense" for i in range(model.config.n_layers)],
        }

    @staticmethod
    def _their_mixers(kdas: list[Any], mlas: list[Any]) -> dict[str, Any]:
        n = one_of_each((m.latent.n_heads for m in mlas), "n_heads")
        if any(values(m)["rope_base"] for m in mlas):
            raise InputError("latent attention of this family has no positions: rope_base=none")
        return {
            "num_attention_heads": n,
            "num_key_value_heads": n,
            "q_lora_rank": one_of_each((values(m)["q_rank"] for m in mlas), "q_rank"),
            **{theirs: one_of_each((vars(m.latent)[ours] for m in mlas), ours) for theirs, ours in LATENT.items()},
            "linear_num_heads": one_of_each((m.n_heads for m in kdas), "n_heads"),
            "linear_head_dim": one_of_each((m.head_dim for m in kdas), "head_dim"),
            "linear_conv_kernel_dim": one_of_each((values(m)["conv_size"] for m in kdas), "conv_size"),
        }

    @staticmethod
    def _their_router(moes: list[Any]) -> dict[str, Any]:
        names = {
            "num_shared_experts": "n_shared_experts",
            "moe_renormalize": "normalised",
            "routed_scaling_factor": "scale",
            "num_expert_group": "n_groups",
            "topk_group": "top_groups",
        }
        return {theirs: one_of_each((values(m)[ours] for m in moes), ours) for theirs, ours in names.items()}

    def spelling(self, name: str) -> str:
        """Transformers writes dense feed-forwards among the mixtures, the authors do not."""
        dense = re.fullmatch(r"(model\.layers\.\d+)\.block_sparse_moe\.(gate|up|down)_proj\.weight", name)
        return f"{dense[1]}.mlp.{dense[2]}_proj.weight" if dense else name

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers, (dense, sparse) = layers_by_name(model, "kda", "mla"), feedforwards(model)
        count = values(next(iter(sparse.values())))["n_experts"]
        rates = changed("self_attn.A_log", "mixers.0.A_log", lambda t: t.flatten(), lambda t: t[None, None, :, None])
        moe = [
            rename("block_sparse_moe.gate.weight", "mixers.1.router.weight"),
            rename("block_sparse_moe.gate.e_score_correction_bias", "mixers.1.selection_bias"),
            rename("block_sparse_moe.shared_experts", "mixers.1.shared_experts"),
            *expert_rules("block_sparse_moe.experts", "mixers.1.experts", count, ("w1", "w3", "w2")),
        ]
        return [
            *STEM,
            *in_blocks(NORMS, range(model.config.n_layers)),
            *in_blocks([*renames("self_attn", "mixers.0", KDA), rates], layers["kda"]),
            *in_blocks(renames("self_attn", "mixers.0.latent", MLA), layers["mla"]),
            *in_blocks(GATED_MLP, dense),
            *in_blocks(moe, sparse),
        ]
