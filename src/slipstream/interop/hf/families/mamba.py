"""Mamba (Gu & Dao 2023, arXiv:2312.00752) in transformers' form: nothing but its layers, each behind a norm."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import attention_layers, model_config, part, pattern, sizes, stem, their_sizes
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.state_space import MAMBA, RUN_AND_TRAINED, selective, their_selective
from slipstream.interop.hf.weights import Rule, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

EPS = "layer_norm_epsilon"
CONVERTED = (
    "d_inner d_model fused_add_norm n_layer pad_vocab_size_multiple rms_norm ssm_cfg"  # left by the authors' own files
)


class Mamba(Family):
    model_types = ("mamba",)
    architecture = "MambaForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, tied=True, eps=1e-5, eps_name=EPS)
        layer = part("mamba", selective(hf, MAMBA))
        hf.ignore("intermediate_size", *RUN_AND_TRAINED, *CONVERTED.split())
        return model_config(pattern([(layer,)]), about)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        return their_sizes(model, EPS) | their_selective(attention_layers(model, "mamba"), MAMBA)

    def rules(self, model: LanguageModel) -> list[Rule]:
        block = [rename("norm", "norms.0"), rename("mixer", "mixers.0")]
        return [
            *stem("backbone", "embeddings", "norm_f"),
            *in_blocks(block, range(model.config.n_layers), "backbone.layers"),
        ]
