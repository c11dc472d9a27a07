"""Falcon Mamba (TII 2024, arXiv:2410.05355): Mamba with RMS norms, without weights, on what every token chooses."""

from __future__ import annotations

from typing import Any

import torch

from slipstream.interop.hf.decoder import (
    attention_layers,
    model_config,
    part,
    pattern,
    sizes,
    stem,
    their_sizes,
    values,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.state_space import MAMBA, RUN_AND_TRAINED, selective, their_selective
from slipstream.interop.hf.weights import Rule, fixed, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

EPS = "layer_norm_epsilon"


class FalconMamba(Family):
    model_types = ("falcon_mamba",)
    architecture = "FalconMambaForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, tied=True, eps=1e-5, eps_name=EPS)
        norms = {"norms": True, "norm_eps": hf.number("mixer_rms_eps", 1e-6)}
        layer = part("mamba", selective(hf, MAMBA), norms)
        hf.ignore("intermediate_size", *RUN_AND_TRAINED)
        return model_config(pattern([(layer,)]), about)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers = attention_layers(model, "mamba")
        eps = one_of_each((values(m)["norm_eps"] for m in layers), "norm_eps")
        return {**their_sizes(model, EPS), **their_selective(layers, MAMBA), "mixer_rms_eps": eps}

    def rules(self, model: LanguageModel) -> list[Rule]:
        first = attention_layers(model, "mamba")[0]
        learned = "in_proj conv1d x_proj dt_proj A_log D out_proj"
        norms = [f"{name}_layernorm.weight" for name in ("dt", "b", "c")]
        block = [
            rename("norm", "norms.0"),
            *(rename(f"mixer.{name}", f"mixers.0.{name}") for name in learned.split()),
            *(fixed(f"mixers.0.{name}", torch.ones(first.get_parameter(name).shape)) for name in norms),
        ]
        return [
            *stem("backbone", "embeddings", "norm_f"),
            *in_blocks(block, range(model.config.n_layers), "backbone.layers"),
        ]
