"""Mamba. The decay rates are kept as what they are, and not by their logarithm, which loses a last digit on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import Architecture, Change, There, vocabulary_of
from slipstream.interop.gguf.state_space import BACKBONE, RATES, SSM, WIDE, convolution, of_ssm, their_ssm
from slipstream.interop.hf.fields import Fields


class Mamba(Architecture):
    name = "mamba"
    model_type = "mamba"
    layers = "backbone.layers"
    stem = BACKBONE
    modules = SSM | {"mixer.x_proj": "ssm_x", "mixer.dt_proj": "ssm_dt"}
    wide = WIDE

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        said.only("ssm.dt_b_c_rms", False)
        config = of_ssm(said) | vocabulary_of(said, there)
        return config | {"time_step_rank": said.whole("ssm.time_step_rank")}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["use_bias"] or not config["use_conv_bias"]:
            raise InputError("mamba in llama.cpp has a bias on its convolution, and on no projection")
        return their_ssm(config) | {"ssm.time_step_rank": config["time_step_rank"], "ssm.dt_b_c_rms": False}

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return {"ssm_conv1d": convolution(), "ssm_a": RATES}
