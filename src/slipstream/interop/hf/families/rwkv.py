"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048) in transformers' form.

Transformers halves the residual stream every `rescale_every` layers, and the weights that write to it, so that float16 does not
overflow. It is not done here, and changes logits by what is added under the roots of norms alone, where there are so many layers.
"""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import (
    attention_layers,
    model_config,
    part,
    pattern,
    second_mixers,
    sizes,
    their_sizes,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

EPS = "layer_norm_epsilon"
BLOCK = [
    rename("ln1", "norms.0"),
    rename("ln2", "norms.1"),
    rename("attention", "mixers.0"),
    rename("feed_forward", "mixers.1"),
]


class RWKV(Family):
    model_types = ("rwkv",)
    architecture = "RwkvForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, eps=1e-5, eps_name=EPS)
        hf.only(EPS, 1e-5)  # the last norm has it whatever is said
        about["context"] = hf.whole("context_length", 1024)
        d_model = about["d_model"]
        inner = hf.whole("attention_hidden_size", d_model)
        time_mix = part("rwkv4", d_inner=None if inner == d_model else inner)
        channel_mix = part("rwkv_channel_mix", d_ff=hf.whole("intermediate_size", 4 * d_model))
        hf.ignore("rescale_every")
        return model_config(pattern([(time_mix, channel_mix)]), about, norm="layer", embedding_norm=True)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        mixes: list[Any] = attention_layers(model, "rwkv4")
        channels: list[Any] = list(second_mixers(model, "rwkv_channel_mix"))
        about = their_sizes(model, EPS)
        return about | {
            "context_length": about.pop("max_position_embeddings"),
            "attention_hidden_size": one_of_each((m.key.out_features for m in mixes), "d_inner"),
            "intermediate_size": one_of_each((m.key.out_features for m in channels), "d_ff"),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        return [
            rename("rwkv.blocks.0.pre_ln", "embedding.norm"),
            rename("rwkv.embeddings.weight", "embedding.weight"),
            rename("rwkv.ln_out", "stack.norm"),
            rename("head", "head.proj"),
            *in_blocks(BLOCK, range(model.config.n_layers), "rwkv.blocks"),
        ]
