"""OLMo Hybrid (Ai2 2026): three layers of Gated DeltaNet, with negative eigenvalues, to one of softmax as in OLMo 3.

Norms stand before the mixers of DeltaNet's blocks, and after those of softmax's.
"""

from __future__ import annotations

from typing import Any

import torch

from slipstream.interop.hf.decoder import (
    ATTENTION,
    GATED_MLP,
    NORMS,
    STEM,
    biases,
    gated_mlp,
    heads,
    layers_by_name,
    model_config,
    part,
    pattern,
    renames,
    rope,
    second_mixers,
    sizes,
    their_biases,
    their_gated_mlp,
    their_heads,
    their_rope,
    their_sizes,
    values,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.gated_delta import delta, layer_kinds, their_delta, their_layer_kinds
from slipstream.interop.hf.weights import Rule, Tensors, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import Part

DELTA = "q_proj k_proj v_proj a_proj b_proj g_proj A_log dt_bias o_norm o_proj"
AFTER = [rename("post_attention_layernorm", "out_norms.0"), rename("post_feedforward_layernorm", "out_norms.1")]
DELTA_EPS = 1e-5  # of the norm within DeltaNet, whatever settings say


class OlmoHybrid(Family):
    model_types = ("olmo_hybrid",)
    architecture = "OlmoHybridForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about, n = sizes(hf), hf.whole("num_attention_heads")
        width = int(0.75 * about["d_model"] / hf.whole("linear_num_key_heads", n))
        widths = width, 2 * hf.whole("linear_key_head_dim", width)
        mixer = delta(hf, DELTA_EPS, n, n, widths)
        if hf.flag("linear_allow_neg_eigval", True):
            mixer.settings["negative_eigenvalues"] = True
        hf.ignore(*(f"linear_{name}" for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")))
        mixers, mlp = (
            {"linear_attention": mixer, "full_attention": self._attention(hf, about["norm_eps"])},
            gated_mlp(hf),
        )
        kinds = layer_kinds(hf, about["n_layers"])
        return model_config(pattern((mixers[kind], mlp) for kind in kinds), about, norm_place="after_attention")

    @staticmethod
    def _attention(hf: Fields, norm_eps: float) -> Part:
        """Without positions where there is a table of them and no base in it."""
        placed = hf.table_of("rope_parameters").has("rope_theta") or not hf.has("rope_parameters")
        turned = rope(hf) if placed else {"rope_base": "none"}
        return part("attention", heads(hf), turned, biases(hf), qk_norm="whole", qk_norm_eps=norm_eps)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers = layers_by_name(model, "gated_deltanet", "attention")
        attention, deltas = list(layers["attention"].values()), list(layers["gated_deltanet"].values())
        placed = one_of_each((values(m)["rope_base"] for m in attention), "rope_base") is not None
        return {
            **their_sizes(model),
            **their_heads(attention),
            **their_biases(attention),
            **their_gated_mlp(second_mixers(model)),
            **their_delta(deltas),
            "rope_parameters": their_rope(attention) if placed else {"rope_type": "default", "rope_theta": None},
            "linear_allow_neg_eigval": one_of_each((values(m)["negative_eigenvalues"] for m in deltas), "signs"),
            "layer_types": their_layer_kinds(layers, "gated_deltanet"),
        }

    def spelling(self, name: str) -> str:
        """Transformers writes two norms under the authors' names."""
        name = name.replace("attention_layer_norm", "input_layernorm")
        return name.replace("feedforward_layer_norm", "post_attention_layernorm")

    def rules(self, model: LanguageModel) -> list[Rule]:
        layers = layers_by_name(model, "gated_deltanet", "attention")
        convs = _convolutions(next(iter(layers["gated_deltanet"].values())))
        return [
            *STEM,
            *in_blocks(GATED_MLP, range(model.config.n_layers)),
            *in_blocks([*NORMS, *renames("linear_attn", "mixers.0", DELTA), convs], layers["gated_deltanet"]),
            *in_blocks([*AFTER, *ATTENTION], layers["attention"]),
        ]


def _convolutions(mixer: Any) -> Rule:
    """Of q, k and v. Transformers writes all channels as three equal parts, also where v has more than q: they are one here."""
    k, v = mixer.n_heads * mixer.head_dim, mixer.n_v_heads * mixer.v_head_dim

    def read(tensors: Tensors) -> Tensors:
        return [t.contiguous() for t in torch.cat(list(tensors)).split([k, k, v])]

    theirs, ours = (tuple(f"{where}.{n}_conv1d.weight" for n in "qkv") for where in ("linear_attn", "mixers.0"))
    return Rule(theirs, ours, read)
