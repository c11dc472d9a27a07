"""Falcon-H1: attention and Mamba-2 side by side in every layer. Its many multipliers are multiplied into the weights, so that what
is read has none, and what is written computes the same with other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import (
    ATTENTION,
    Architecture,
    Change,
    There,
    decoder,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.gguf.state_space import MAMBA2, SSD_SIZES, WIDE, ssd_changes
from slipstream.interop.hf.fields import Fields

NAMES = {
    "input_layernorm": "attn_norm",
    "pre_ff_layernorm.weight": "ffn_norm",  # without .weight there
    **{f"feed_forward.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
MULTIPLIERS = (
    "embedding",
    "lm_head",
    "key",
    "attention_in",
    "attention_out",
    "ssm_in",
    "ssm_out",
)  # _multiplier behind
ONES = {**{f"{n}_multiplier": 1.0 for n in MULTIPLIERS}, "ssm_multipliers": [1.0] * 5, "mlp_multipliers": [1.0] * 2}


class FalconH1(Architecture):
    name = "falcon-h1"
    model_type = "falcon_h1"
    stem = {"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"}
    modules = NAMES | ATTENTION | MAMBA2
    wide = WIDE | {"ssm_norm"}

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        config, inner = decoder(said, there), said.whole("ssm.inner_size")
        sizes = {theirs: said.whole(name) for theirs, name in SSD_SIZES.items()}
        return {
            **config,
            **sizes,
            "rope_parameters": rope(said),
            "mamba_d_ssm": inner,
            "mamba_d_head": inner // sizes["mamba_n_heads"],
            "mamba_rms_norm": "blk.0.ssm_norm.weight" in there.shapes,
            "mamba_norm_before_gate": False,
            "mlp_bias": "blk.0.ffn_gate.bias" in there.shapes,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["mamba_rms_norm"] and config["mamba_norm_before_gate"]:
            raise InputError("falcon-h1 in llama.cpp has no norm before a gate")
        if config["tie_word_embeddings"] and config["embedding_multiplier"] != config["lm_head_multiplier"]:
            raise InputError("falcon-h1 in llama.cpp has no embedding that is multiplied otherwise than the head it is")
        return {
            **their_decoder(config),
            **their_rope(config["rope_parameters"]),
            **{name: config[theirs] for theirs, name in SSD_SIZES.items()},
            "ssm.inner_size": config["mamba_d_ssm"],
        }

    def baked(self, config: dict[str, Any]) -> dict[str, Any]:
        return config | ONES

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        by = {n: config.get(f"{n}_multiplier", 1.0) for n in MULTIPLIERS}
        gate, down = config.get("mlp_multipliers", ONES["mlp_multipliers"])
        return {
            **ssd_changes(config["mamba_n_groups"]),
            "token_embd": _times(by["embedding"]),
            "output": _times(by["lm_head"]),
            "attn_q": _times(by["attention_in"]),
            "attn_k": _times(by["attention_in"] * by["key"]),
            "attn_v": _times(by["attention_in"]),
            "attn_output": _times(by["attention_out"]),
            "ssm_in": _times(by["ssm_in"] * _rows(config)),
            "ssm_out": _times(by["ssm_out"]),
            "ffn_gate": _times(gate),
            "ffn_down": _times(down),
        }


def _times(by: float | Tensor) -> Change:
    return Change(lambda t: t, lambda t: t * by)


def _rows(config: Mapping[str, Any]) -> Tensor:
    """What each row of the projection into Mamba-2 is multiplied by: those of z, x, B, C and dt."""
    inner, states = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    parts = config.get("ssm_multipliers", ONES["ssm_multipliers"])
    sizes = (inner, inner, states, states, config["mamba_n_heads"])
    return torch.cat([torch.full((n, 1), float(by)) for n, by in zip(sizes, parts)])
