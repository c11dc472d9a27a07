"""LFM2 (Liquid AI 2025, arXiv:2511.23404): double-gated short convolutions, with a softmax layer after every two or three."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    first_mixers,
    layers_by_name,
    model_config,
    part,
    pattern,
    second_mixers,
    sizes,
    stem,
    their_gated_mlp,
    their_sizes,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.short_conv import (
    ATTENTION,
    CONVOLUTION,
    EPS,
    GATED,
    KINDS,
    NORMS,
    mixers,
    their_mixers,
    tied,
)
from slipstream.interop.hf.weights import Rule, in_blocks
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel


class LFM2(Family):
    model_types = ("lfm2",)
    architecture = "Lfm2ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, eps=1e-5, eps_name=EPS)
        about["tie_embeddings"] = tied(hf)
        of_kind = mixers(hf, about["norm_eps"])
        n, mlp = about["n_layers"], part("swiglu", d_ff=self._width(hf))
        full = hf.wholes("full_attn_idxs", list(range(n)))
        kinds = hf.words("layer_types", KINDS, n, [("conv", "full_attention")[i in full] for i in range(n)])
        hf.ignore(
            "theta", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "block_dim", "block_use_swiglu", "num_heads"
        )
        hf.ignore(
            "block_norm_eps", "block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "use_pos_enc"
        )
        return model_config(pattern((of_kind[kind], mlp) for kind in kinds), about)

    @staticmethod
    def _width(hf: Fields) -> int:
        """Two thirds of what is said, by a factor, rounded up; or as it is said."""
        said = hf.whole("block_ff_dim", hf.whole("intermediate_size"))
        factor, multiple = hf.number("block_ffn_dim_multiplier", 1.0, most=1e3), hf.whole("block_multiple_of", 256)
        if not hf.flag("block_auto_adjust_ff_dim", True):
            return said
        return multiple * -(-int(factor * int(2 * said / 3)) // multiple)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers = layers_by_name(model, "lfm2_conv", "attention")
        theirs = {ours: kind for kind, ours in KINDS.items()}
        return {
            **their_sizes(model, EPS),
            **their_mixers(layers["attention"].values(), layers["lfm2_conv"].values()),
            "intermediate_size": their_gated_mlp(second_mixers(model))["intermediate_size"],
            "block_auto_adjust_ff_dim": False,
            "layer_types": [theirs[mixer.name] for mixer in first_mixers(model)],
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers = layers_by_name(model, "lfm2_conv", "attention")
        return [
            *stem(norm="embedding_norm"),
            *in_blocks([*NORMS, *GATED], range(model.config.n_layers)),
            *in_blocks(CONVOLUTION, layers["lfm2_conv"]),
            *in_blocks(ATTENTION, layers["attention"]),
        ]
