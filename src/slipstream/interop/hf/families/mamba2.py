"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060) in transformers' form, Codestral Mamba among them: nothing but its layers."""

from __future__ import annotations

from typing import Any

from slipstream.interop.hf.decoder import attention_layers, model_config, part, pattern, sizes, stem, their_sizes
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.state_space import BAMBA, MAMBA, RUN_AND_TRAINED, ssd, their_ssd
from slipstream.interop.hf.weights import Rule, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

EPS = "layer_norm_epsilon"
NAMES = BAMBA | MAMBA | {"n_heads": "num_heads", "head_dim": "head_dim", "n_groups": "n_groups"}


class Mamba2(Family):
    model_types = ("mamba2",)
    architecture = "Mamba2ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, eps=1e-5, eps_name=EPS)
        hf.only("hidden_act", "silu", "swish")
        hf.ignore("chunk_size", "time_step_rank", "norm_before_gate", "rms_norm", *RUN_AND_TRAINED)
        layer = ssd(hf, NAMES, n_heads=128, n_groups=8, d_state=128, conv_size=4)
        return model_config(pattern([(part("mamba2", layer, norm_eps=about["norm_eps"]),)]), about)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        return their_sizes(model, EPS) | their_ssd(attention_layers(model, "mamba2"), NAMES)

    def rules(self, model: LanguageModel) -> list[Rule]:
        block = [rename("norm", "norms.0"), rename("mixer", "mixers.0")]
        return [
            *stem("backbone", "embeddings", "norm_f"),
            *in_blocks(block, range(model.config.n_layers), "backbone.layers"),
        ]
