"""gpt-oss: sinks, windows in every other layer, biases everywhere, experts of clamped units, whose gates and ups are apart.

Published files are in MXFP4, which the package gguf reads; here it becomes float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import (
    ATTENTION,
    Architecture,
    There,
    decoder,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.gguf.experts import WIDTH, of_mixture, their_mixture
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule, changed

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}
CLAMP = 7.0  # known by heart


class GptOss(Architecture):
    name = "gpt-oss"
    model_type = "gpt_oss"
    modules = NAMES | ATTENTION
    wide = frozenset({"ffn_gate_exps.bias", "ffn_up_exps.bias", "ffn_down_exps.bias"})

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        config = decoder(said, there)
        n, positions = config["num_hidden_layers"], rope(said)
        exact = {"truncate": False} if positions["rope_type"] == "yarn" else {}
        return {
            **config,
            **of_mixture(said, "num_local_experts"),
            "intermediate_size": said.whole(WIDTH, config["intermediate_size"]),
            "rope_parameters": positions | exact,
            "sliding_window": said.whole("attention.sliding_window"),
            "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(n)],
            "attention_bias": True,
            "swiglu_limit": CLAMP,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["swiglu_limit"] != CLAMP or not config["attention_bias"]:
            raise InputError(f"gpt-oss in llama.cpp has biases everywhere, and units that are clamped at {CLAMP}")
        return {
            **their_decoder(config),
            **their_rope(config["rope_parameters"]),
            **their_mixture(config, "num_local_experts"),
            WIDTH: config["intermediate_size"],
            "attention.sliding_window": config["sliding_window"],
        }

    def regrouped(self, config: Mapping[str, Any]) -> list[Rule]:
        return [
            _in_turns("weight", "mlp.experts.gate_up_proj"),
            _in_turns("bias", "mlp.experts.gate_up_proj_bias"),
            changed("ffn_down_exps.weight", "mlp.experts.down_proj", lambda t: t.mT, lambda t: t.mT),
        ]


def _in_turns(kind: str, theirs: str) -> Rule:
    """Of transformers' tensor the last axis has gates and ups in turns, and weights are transposed."""

    def read(tensors: Any) -> list[torch.Tensor]:
        both = torch.stack(list(tensors), 2).flatten(1, 2)
        return [both.mT if kind == "weight" else both]

    def write(tensors: Any) -> list[torch.Tensor]:
        both = tensors[0].mT if kind == "weight" else tensors[0]
        return [both[:, ::2].contiguous(), both[:, 1::2].contiguous()]

    return Rule((f"ffn_gate_exps.{kind}", f"ffn_up_exps.{kind}"), (theirs,), read, write)
