"""Nemotron-H (NVIDIA 2025, arXiv:2504.03624): every layer is one thing, Mamba-2, softmax without positions, or a feed-forward.

Not its layers of experts (Nemotron 3), which have no gate.
"""

from __future__ import annotations

from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.hf.decoder import (
    ACTIVATIONS,
    THEIR_ACTIVATIONS,
    first_mixers,
    heads,
    layers_by_name,
    model_config,
    part,
    pattern,
    renames,
    sizes,
    stem,
    their_heads,
    their_sizes,
    values,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.state_space import MAMBA, RUN_AND_TRAINED, ssd, their_ssd
from slipstream.interop.hf.weights import Rule, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

EPS = "layer_norm_epsilon"
OURS = {
    "linear_attention": "mamba2",
    "mamba": "mamba2",
    "full_attention": "attention",
    "attention": "attention",
    "mlp": "mlp",
}
LETTERS = {"M": "mamba2", "*": "attention", "-": "mlp"}
THEIRS = {"mamba2": "linear_attention", "attention": "full_attention", "mlp": "mlp"}
NAMES = MAMBA | {
    "n_heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "n_groups": "n_groups",
    "d_state": "ssm_state_size",
}
ATTENTION = [*renames("mixer", "mixers.0.qkv", "q_proj k_proj v_proj"), rename("mixer.o_proj", "mixers.0.o_proj")]


class NemotronH(Family):
    model_types = ("nemotron_h",)
    architecture = "NemotronHForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        kinds = self._kinds(hf)
        hf.table["num_hidden_layers"] = len(kinds)  # as transformers counts them, whatever is said
        about = sizes(hf, eps=1e-5, eps_name=EPS)
        about["tie_embeddings"] = False  # in transformers too, whatever is said
        blocks = {
            "attention": part("attention", heads(hf, 128), {"rope_base": "none"}),
            "mamba2": self._mamba(hf, about["norm_eps"]),
            "mlp": self._mlp(hf),
        }
        hf.ignore(
            "rms_norm_eps", "attention_bias", "mamba_proj_bias", "mamba_ssm_cache_dtype", "chunk_size", *RUN_AND_TRAINED
        )
        hf.ignore(
            *(name for name in hf.table if name.startswith(("moe_", "mtp_", "n_routed", "n_shared", "num_experts")))
        )
        hf.ignore("routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob", "num_nextn_predict_layers")
        hf.ignore("num_query_groups", "attention_head_dim", "rope_theta", "partial_rotary_factor")
        return model_config(pattern((blocks[kind],) for kind in kinds), about)

    @staticmethod
    def _kinds(hf: Fields) -> list[str]:
        """By words, or by one letter a layer."""
        letters = hf.word("hybrid_override_pattern", [str(hf.table.get("hybrid_override_pattern", ""))], "")
        if hf.has("layers_block_type") or hf.has("layer_types"):
            said = hf.words("layers_block_type", OURS, None, hf.words("layer_types", OURS, None, ["mlp"]))
            return [OURS[word] for word in said]
        if not letters or set(letters) - set(LETTERS):
            raise InputError(
                f"{hf.owner}: hybrid_override_pattern {letters!r:.60} must be of the letters {' '.join(LETTERS)}"
            )
        return [LETTERS[letter] for letter in letters]

    @staticmethod
    def _mamba(hf: Fields, norm_eps: float) -> Any:
        """Its step size has a lower bound, which transformers takes from time_step_min and not from time_step_limit."""
        hf.table["hidden_act"] = hf.word("mamba_hidden_act", ("silu", "swish"), "silu")
        hf.only("hidden_act", "silu", "swish")
        layer = ssd(hf, NAMES, n_heads=128, n_groups=8, d_state=128, conv_size=4)
        return part("mamba2", layer | {"dt_min": hf.number("time_step_min", 0.001), "dt_max": None}, norm_eps=norm_eps)

    @staticmethod
    def _mlp(hf: Fields) -> Any:
        act = ACTIVATIONS[hf.word("mlp_hidden_act", ACTIVATIONS, "relu2")]
        hf.only("sliding_window", None)
        bias = True if hf.flag("mlp_bias", False) else None
        return part("mlp", d_ff=hf.whole("intermediate_size", 21504), activation=act, bias=bias)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers = layers_by_name(model, *THEIRS)
        mlps = list(layers["mlp"].values())
        ups: list[Any] = [mixer.get_submodule("up_proj") for mixer in mlps]
        mamba = their_ssd(layers["mamba2"].values(), NAMES)
        mamba.pop("time_step_limit", None)
        sizes = their_sizes(model, EPS)
        sizes.pop("num_hidden_layers")
        return {
            **sizes,
            **their_heads(layers["attention"].values()),
            **mamba,
            "time_step_min": one_of_each((values(m)["dt_min"] for m in layers["mamba2"].values()), "dt_min"),
            "intermediate_size": one_of_each((up.out_features for up in ups), "d_ff"),
            "mlp_hidden_act": THEIR_ACTIVATIONS[one_of_each((values(m)["activation"] for m in mlps), "activation")],
            "mlp_bias": one_of_each((values(m)["bias"] for m in mlps), "bias"),
            "layers_block_type": [THEIRS[mixer.name] for mixer in first_mixers(model)],
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers, where = layers_by_name(model, *THEIRS), "backbone.layers"
        return [
            *stem("backbone", "embeddings", "norm_f"),
            *in_blocks([rename("norm", "norms.0")], range(model.config.n_layers), where),
            *in_blocks([rename("mixer", "mixers.0")], [*layers["mamba2"], *layers["mlp"]], where),
            *in_blocks(ATTENTION, layers["attention"], where),
        ]

    def surplus(self, name: str, config: ModelConfig) -> bool:
        return name.startswith("mtp.") or super().surplus(name, config)
