"""Qwen3-Next: Gated DeltaNet, every fourth layer attention with a gate, and many small experts beside one for all tokens.

What transformers has head by head, queries, keys, values and gates of the linear layers, is here all queries, then all keys, then
all values, and the gates apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import (
    ATTENTION,
    QK_NORMS,
    Architecture,
    Change,
    There,
    decoder,
    plus_one,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.gguf.experts import SHARED_WIDTH, WIDTH, experts, of_mixture, their_mixture
from slipstream.interop.gguf.state_space import RATES, convolution
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule, Tensors

DELTA = {
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
MOE = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.shared_expert.{x}_proj": f"ffn_{x}_shexp" for x in ("gate", "up", "down")},
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}
SIZES = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
TURNED, EVERY, RECURRENT = "rope.dimension_count", "full_attention_interval", "attention.recurrent_layers"
KINDS = ("linear_attention", "full_attention")


class Qwen3Next(Architecture):
    name = "qwen3next"
    model_type = "qwen3_next"
    modules = NORMS | ATTENTION | QK_NORMS | DELTA | MOE
    wide = frozenset({"ssm_conv1d"})

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        whole_heads = Fields({n: v for n, v in said.table.items() if n != TURNED}, said.owner)
        whole_heads.asked = said.asked
        config, sizes = decoder(whole_heads, there), {theirs: said.whole(name) for theirs, name in SIZES.items()}
        turned = said.whole(TURNED, config["head_dim"] // 4) / config["head_dim"]
        if said.whole("ssm.inner_size") != sizes["linear_num_value_heads"] * sizes["linear_key_head_dim"]:
            raise InputError(f"{said.owner}: ssm.inner_size is not that of values as wide as keys")
        return {
            **config,
            **sizes,
            **of_mixture(said, "num_experts"),
            "moe_intermediate_size": said.whole(WIDTH, config["intermediate_size"]),
            "shared_expert_intermediate_size": said.whole(SHARED_WIDTH, config["intermediate_size"]),
            "linear_value_head_dim": sizes["linear_key_head_dim"],
            "rope_parameters": rope(said) | {"partial_rotary_factor": turned},
            "layer_types": self._kinds(said, config["num_hidden_layers"]),
            "norm_topk_prob": True,
        }

    @staticmethod
    def _kinds(said: Fields, n_layers: int) -> list[str]:
        every, recurrent = said.whole(EVERY, 4), said.table.get(RECURRENT)
        said.ignore(RECURRENT)
        kinds = [KINDS[(i + 1) % every == 0] for i in range(n_layers)]
        if recurrent is not None and recurrent != [kind == KINDS[0] for kind in kinds]:
            raise InputError(f"{said.owner}: {RECURRENT} are not all but every {every}th layer")
        return kinds

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["mlp_only_layers"] or config["linear_key_head_dim"] != config["linear_value_head_dim"]:
            raise InputError("qwen3next in llama.cpp has experts in every layer, and values as wide as keys")
        positions = config["rope_parameters"]
        return {
            **their_decoder(config),
            **their_rope(positions),
            **their_mixture(config, "num_experts"),
            **{name: config[theirs] for theirs, name in SIZES.items()},
            TURNED: round(config["head_dim"] * positions["partial_rotary_factor"]),
            EVERY: (config["layer_types"] + [KINDS[1]]).index(KINDS[1]) + 1,
            WIDTH: config["moe_intermediate_size"],
            SHARED_WIDTH: config["shared_expert_intermediate_size"],
            "ssm.inner_size": config["linear_num_value_heads"] * config["linear_value_head_dim"],
        }

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return {
            **plus_one("output_norm", "attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm"),
            "ssm_conv1d": convolution(),
            "ssm_a": RATES,
            "ffn_gate_inp_shexp": Change(lambda t: t[None], lambda t: t[0]),
        }

    def regrouped(self, config: Mapping[str, Any]) -> list[Rule]:
        return [*experts("mlp.experts", config["num_experts"]), _apart(config)]


def _apart(config: Mapping[str, Any]) -> Rule:
    heads, k = config["linear_num_key_heads"], config["linear_key_head_dim"]
    v = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]  # of all that share a key

    def together(tensors: Tensors) -> Tensors:
        parts = [*tensors[0].split([heads * k, heads * k, heads * v]), tensors[1]]
        return [torch.cat([t.unflatten(0, (heads, -1)) for t in parts], 1).flatten(0, 1)]

    def apart(tensors: Tensors) -> Tensors:
        parts = [t.flatten(0, 1) for t in tensors[0].unflatten(0, (heads, -1)).split([k, k, v, v], 1)]
        return [torch.cat(parts[:3]), parts[3]]

    return Rule(("attn_qkv.weight", "attn_gate.weight"), ("linear_attn.in_proj_qkvz.weight",), together, apart)
