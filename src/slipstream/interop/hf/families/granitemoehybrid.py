"""Granite 4 (IBM 2025): mostly Mamba-2, softmax with or without positions, experts beside a feed-forward for all."""

from __future__ import annotations

from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.hf.decoder import (
    ATTENTION,
    NORMS,
    STEM,
    biases,
    heads,
    layers_by_name,
    model_config,
    part,
    pattern,
    rope,
    sizes,
    their_biases,
    their_gated_mlp,
    their_heads,
    their_rope,
    their_sizes,
    values,
)
from slipstream.interop.hf.experts import feedforwards, mixture, their_mixture
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.state_space import BAMBA, RUN_AND_TRAINED, ssd, their_ssd
from slipstream.interop.hf.weights import Rule, cut, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import Part

KINDS = {"linear_attention": "mamba2", "full_attention": "attention", "mamba": "mamba2", "attention": "attention"}
EXPERTS = [
    rename("block_sparse_moe.router.layer", "mixers.1.router"),
    rename("block_sparse_moe.input_linear.weight", "mixers.1.experts.gate_up_proj"),
    rename("block_sparse_moe.output_linear.weight", "mixers.1.experts.down_proj"),
]


class GraniteMoeHybrid(Family):
    model_types = ("granitemoehybrid",)
    architecture = "GraniteMoeHybridForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf)
        layer = ssd(hf, BAMBA, n_heads=128, n_groups=1, d_state=256, conv_size=4)
        mixers = {"mamba2": part("mamba2", layer, norm_eps=about["norm_eps"]), "attention": self._attention(hf)}
        n = about["n_layers"]
        kinds, feedforward = hf.words("layer_types", KINDS, n, ["mamba"] * n), self._feedforward(hf, n)
        hf.only("normalization_function", "rmsnorm")
        hf.ignore("mamba_chunk_size", "init_method", "layers_block_type", *RUN_AND_TRAINED)
        return model_config(
            pattern((mixers[KINDS[kind]], feedforward) for kind in kinds),
            about,
            embedding_scale=float(hf.number("embedding_multiplier", 1.0)),
            residual_scale=float(hf.number("residual_multiplier", 1.0)),
            logit_scale=1 / self._divisor(hf),
        )

    @staticmethod
    def _divisor(hf: Fields) -> float:
        """What logits are divided by."""
        scaling = float(hf.number("logits_scaling", 1.0))
        if scaling <= 0:
            raise InputError(f"{hf.owner}: logits_scaling {scaling} must be above 0")
        return scaling

    @staticmethod
    def _attention(hf: Fields) -> Part:
        head, scale = heads(hf), float(hf.number("attention_multiplier", 1.0))
        placed = hf.word("position_embedding_type", ("rope", "nope"), "nope") == "rope"
        turned = rope(hf)
        return part(
            "attention",
            head,
            biases(hf),
            turned if placed else {"rope_base": "none"},
            qk_scale=None if scale == head["head_dim"] ** -0.5 else scale,
        )

    @staticmethod
    def _feedforward(hf: Fields, n_layers: int) -> Part:
        """Experts and, as wide as some of them, a feed-forward for all; or that alone."""
        shared, width = hf.whole("shared_intermediate_size", 1024), hf.whole("intermediate_size", 11008)
        if hf.whole("num_local_experts", 8, least=0) == 0:
            hf.only("hidden_act", "silu", "swish")
            hf.ignore("num_experts_per_tok")
            return part("swiglu", d_ff=shared)
        if shared % width:
            raise InputError(
                f"{hf.owner}: shared_intermediate_size {shared} is no multiple of intermediate_size {width}"
            )
        return mixture(hf, "num_local_experts", "intermediate_size", n_layers, n_shared_experts=shared // width)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers, (dense, sparse) = layers_by_name(model, "mamba2", "attention"), feedforwards(model, some=False)
        attention, c = list(layers["attention"].values()), model.config
        head = their_heads(attention)
        scale = one_of_each((values(m)["qk_scale"] for m in attention), "qk_scale") or head["head_dim"] ** -0.5
        placed = one_of_each((values(m)["rope_base"] for m in attention), "rope_base") is not None
        return {
            **their_sizes(model),
            **head,
            **their_biases(attention),
            **their_ssd(layers["mamba2"].values(), BAMBA),
            **(self._their_experts(sparse) if sparse else self._their_mlp(dense)),
            **({"rope_parameters": their_rope(attention)} if placed else {}),
            "position_embedding_type": "rope" if placed else "nope",
            "layer_types": [
                ("linear_attention", "full_attention")[i in layers["attention"]] for i in range(c.n_layers)
            ],
            "attention_multiplier": scale,
            "embedding_multiplier": c.embedding_scale,
            "residual_multiplier": c.residual_scale,
            "logits_scaling": round(1 / c.logit_scale, 10),
        }

    @staticmethod
    def _their_experts(sparse: dict[int, Any]) -> dict[str, Any]:
        said = their_mixture(sparse.values(), "num_local_experts", "intermediate_size")
        shared = one_of_each((values(m)["n_shared_experts"] for m in sparse.values()), "n_shared_experts")
        return said | {"shared_intermediate_size": max(1, shared) * said["intermediate_size"]}

    @staticmethod
    def _their_mlp(dense: dict[int, Any]) -> dict[str, Any]:
        said = their_gated_mlp(dense.values())
        return said | {"shared_intermediate_size": said["intermediate_size"], "num_local_experts": 0}

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers, (dense, sparse) = layers_by_name(model, "mamba2", "attention"), feedforwards(model, some=False)
        return [
            *STEM,
            *in_blocks(NORMS, range(model.config.n_layers)),
            *in_blocks([rename("mamba", "mixers.0")], layers["mamba2"]),
            *in_blocks(ATTENTION, layers["attention"]),
            *in_blocks(self._mlp("mixers.1", dense), dense),
            *in_blocks([*EXPERTS, *self._mlp("mixers.1.shared_experts", sparse)], sparse),
        ]

    @staticmethod
    def _mlp(ours: str, layers: dict[int, Any]) -> list[Rule]:
        """Gate above up in one matrix."""
        if not layers:
            return []
        mixer = next(iter(layers.values()))
        width = (mixer.shared_experts if mixer.name == "moe" else mixer).up_proj.out_features
        return [
            cut("shared_mlp.input_linear", [f"{ours}.gate_proj", f"{ours}.up_proj"], (width, width)),
            rename("shared_mlp.output_linear", f"{ours}.down_proj"),
        ]
