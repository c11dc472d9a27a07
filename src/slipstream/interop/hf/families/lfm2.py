"""LFM2 (Liquid AI 2025, arXiv:2511.23404): double-gated short convolutions, with a softmax layer after every two or three."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    first_mixers,
    heads,
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
from slipstream.interop.hf.state_space import layers_by_name
from slipstream.interop.hf.weights import Rule, in_blocks, rename, renames
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

EPS = "norm_eps"
KINDS = {"conv": "lfm2_conv", "full_attention": "attention"}
EVERYWHERE = [
    rename("operator_norm", "norms.0"),
    rename("ffn_norm", "norms.1"),
    rename("feed_forward.w1", "mixers.1.gate_proj"),
    rename("feed_forward.w3", "mixers.1.up_proj"),
    rename("feed_forward.w2", "mixers.1.down_proj"),
]
ATTENTION = [
    *renames("self_attn", "mixers.0.qkv", "q_proj k_proj v_proj"),
    rename("self_attn.q_layernorm", "mixers.0.qkv.q_norm"),
    rename("self_attn.k_layernorm", "mixers.0.qkv.k_norm"),
    rename("self_attn.out_proj", "mixers.0.o_proj"),
]
CONVOLUTION = [rename("conv", "mixers.0")]


class LFM2(Family):
    model_types = ("lfm2",)
    architecture = "Lfm2ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, eps=1e-5, eps_name=EPS)
        about["tie_embeddings"] = hf.flag("tie_embedding", hf.flag("tie_word_embeddings", True))
        norms = {"qk_norm": True, "qk_norm_eps": about["norm_eps"]}
        mixers = {
            "full_attention": part("attention", heads(hf), rope(hf, base=1e6), norms),
            "conv": part("lfm2_conv", conv_size=hf.whole("conv_L_cache", 3), bias=hf.flag("conv_bias", False)),
        }
        n, mlp = about["n_layers"], part("swiglu", d_ff=self._width(hf))
        full = hf.wholes("full_attn_idxs", list(range(n)))
        kinds = hf.words("layer_types", KINDS, n, [("conv", "full_attention")[i in full] for i in range(n)])
        hf.ignore(
            "theta", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "block_dim", "block_use_swiglu", "num_heads"
        )
        hf.ignore(
            "block_norm_eps", "block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "use_pos_enc"
        )
        return model_config(pattern((mixers[kind], mlp) for kind in kinds), about)

    @staticmethod
    def _width(hf: Fields) -> int:
        """Two thirds of what is said, by a factor, rounded up; or as it is said."""
        said = hf.whole("block_ff_dim", hf.whole("intermediate_size"))
        factor, multiple = hf.number("block_ffn_dim_multiplier", 1.0), hf.whole("block_multiple_of", 256)
        if not hf.flag("block_auto_adjust_ff_dim", True):
            return said
        return multiple * -(-int(factor * int(2 * said / 3)) // multiple)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers = layers_by_name(model, "lfm2_conv", "attention")
        attention, convs = (list(layers[name].values()) for name in ("attention", "lfm2_conv"))
        theirs = {ours: kind for kind, ours in KINDS.items()}
        return {
            **their_sizes(model, EPS),
            **their_heads(attention),
            "rope_parameters": their_rope(attention),
            "conv_L_cache": one_of_each((values(m)["conv_size"] for m in convs), "conv_size"),
            "conv_bias": one_of_each((values(m)["bias"] for m in convs), "bias"),
            "intermediate_size": their_gated_mlp(second_mixers(model))["intermediate_size"],
            "block_auto_adjust_ff_dim": False,
            "layer_types": [theirs[mixer.name] for mixer in first_mixers(model)],
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers = layers_by_name(model, "lfm2_conv", "attention")
        return [
            *stem(norm="embedding_norm"),
            *in_blocks(EVERYWHERE, range(model.config.n_layers)),
            *in_blocks(CONVOLUTION, layers["lfm2_conv"]),
            *in_blocks(ATTENTION, layers["attention"]),
        ]
