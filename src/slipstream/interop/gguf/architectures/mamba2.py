"""Mamba-2. As Mamba; rates and skips have an axis of one more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import Architecture, Change, There, vocabulary_of
from slipstream.interop.gguf.state_space import BACKBONE, SSM, WIDE, of_ssm, ssd_changes, their_ssm
from slipstream.interop.hf.fields import Fields


class Mamba2(Architecture):
    name = "mamba2"
    model_type = "mamba2"
    layers = "backbone.layers"
    stem = BACKBONE
    modules = SSM | {"mixer.dt_bias": "ssm_dt.bias", "mixer.norm": "ssm_norm"}
    wide = WIDE | {"ssm_norm"}

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        n_heads = said.whole("ssm.time_step_rank")
        config = of_ssm(said) | vocabulary_of(said, there)
        width = config["expand"] * config["hidden_size"]
        return config | {
            "n_groups": said.whole("ssm.group_count", 1),
            "num_heads": n_heads,
            "head_dim": width // n_heads,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["use_bias"] or not config["use_conv_bias"]:
            raise InputError("mamba2 in llama.cpp has a bias on its convolution, and on no projection")
        return their_ssm(config) | {"ssm.time_step_rank": config["num_heads"], "ssm.group_count": config["n_groups"]}

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return ssd_changes(config["n_groups"])
