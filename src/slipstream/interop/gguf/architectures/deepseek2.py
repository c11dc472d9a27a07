"""DeepSeek-V2 and V3: latent attention whose second projection is in two, of keys and of values, and many narrow experts.

Which of the two a file is of, its experts' gates say: V3 has sigmoids. Files from before llama.cpp kept the projection in two are
not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import (
    GATED_MLP,
    NORMS,
    Architecture,
    There,
    decoder,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.gguf.experts import DENSE, GATING, SIGMOID, SOFTMAX, WIDTH, experts, of_mixture, their_mixture
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule, Tensors

NAMES = {
    **{f"self_attn.{x}": f"attn_{x.removesuffix('_proj')}" for x in ("q_proj", "q_a_proj", "q_b_proj")},
    **{f"self_attn.{x}_a_layernorm": f"attn_{x}_a_norm" for x in ("q", "kv")},
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.shared_experts.{x}_proj": f"ffn_{x}_shexp" for x in ("gate", "up", "down")},
}
HEADS = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count")
LOG = "rope.scaling.yarn_log_multiplier"  # by which stretched positions make logits larger
SUM, SCALE, SHARED = "expert_weights_norm", "expert_weights_scale", "expert_shared_count"
GROUPS = {"n_group": "expert_group_count", "topk_group": "expert_group_used_count"}


class DeepseekV2(Architecture):
    name = "deepseek2"
    label = "deepseek_v2"
    model_type = "deepseek_v2"
    modules = NORMS | GATED_MLP | NAMES

    def reads(self, said: Mapping[str, Any]) -> bool:
        return said.get(GATING, SOFTMAX) == SOFTMAX

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        for name in (SUM, *GROUPS.values()):
            said.only(name, False, 1)
        said.ignore(GATING)
        return _of_latent(said, there)

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["topk_method"] != "greedy":
            raise InputError("deepseek2 in llama.cpp has no groups of experts as DeepSeek-V2 has")
        return _their_latent(config) | {GATING: SOFTMAX}

    def regrouped(self, config: Mapping[str, Any]) -> list[Rule]:
        return [*experts("mlp.experts", config["n_routed_experts"]), _keys_and_values(config)]


class DeepseekV3(Architecture):
    name = "deepseek2"
    label = "deepseek_v3"
    model_type = "deepseek_v3"
    modules = NORMS | GATED_MLP | NAMES

    def reads(self, said: Mapping[str, Any]) -> bool:
        return said.get(GATING) == SIGMOID

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        said.ignore(GATING)
        groups = {theirs: said.whole(name, 1) for theirs, name in GROUPS.items()}
        return _of_latent(said, there) | groups | {"norm_topk_prob": said.flag(SUM, False)}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        groups = {name: config[theirs] for theirs, name in GROUPS.items()}
        return _their_latent(config) | groups | {GATING: SIGMOID, SUM: config["norm_topk_prob"]}

    def regrouped(self, config: Mapping[str, Any]) -> list[Rule]:
        return [*experts("mlp.experts", config["n_routed_experts"]), _keys_and_values(config)]


def _of_latent(said: Fields, there: There) -> dict[str, Any]:
    """config.json of what both have."""
    plain = Fields({n: v for n, v in said.table.items() if n not in HEADS}, said.owner)
    plain.asked = said.asked
    config, positions = decoder(plain, there), rope(said)
    turned, rank = said.whole("rope.dimension_count"), said.whole("attention.kv_lora_rank")
    for name, size in zip(HEADS, (1, rank + turned, rank)):
        said.only(name, size)
    if weight := said.number(LOG, 0.0) * 10:
        positions |= {"mscale": round(weight, 6), "mscale_all_dim": round(weight, 6)}
    return {
        **{n: v for n, v in config.items() if n != "head_dim"},
        **of_mixture(said, "n_routed_experts"),
        "rope_parameters": positions,
        "q_lora_rank": said.whole("attention.q_lora_rank", 0, least=0) or None,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": said.whole("attention.key_length_mla") - turned,
        "v_head_dim": said.whole("attention.value_length_mla"),
        "first_k_dense_replace": said.whole(DENSE, 0, least=0),
        "moe_intermediate_size": said.whole(WIDTH),
        "n_shared_experts": said.whole(SHARED),
        "routed_scaling_factor": said.number(SCALE, 1.0),
    }


def _their_latent(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse."""
    kv, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    positions = config["rope_parameters"]
    said = their_decoder({**config, "head_dim": kv, "num_key_value_heads": 1}) | their_rope(positions)
    if "mscale_all_dim" in positions:
        said[LOG] = 0.1 * positions["mscale_all_dim"]
    return {
        **said,
        **their_mixture(config, "n_routed_experts"),
        "attention.q_lora_rank": config["q_lora_rank"]
        or 0,  # without it, llama.cpp reads models of 26 or 27 layers alone
        "attention.kv_lora_rank": kv,
        "attention.key_length": kv + turned,
        "attention.value_length": kv,
        "attention.key_length_mla": config["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": turned,
        DENSE: config["first_k_dense_replace"],
        WIDTH: config["moe_intermediate_size"],
        SHARED: config["n_shared_experts"],
        SCALE: float(config["routed_scaling_factor"]),
    }


def _keys_and_values(config: Mapping[str, Any]) -> Rule:
    heads, k, v = (config[n] for n in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))

    def together(tensors: Tensors) -> Tensors:
        return [torch.cat([tensors[0].mT, tensors[1]], 1).flatten(0, 1)]

    def apart(tensors: Tensors) -> Tensors:
        keys, values = tensors[0].unflatten(0, (heads, -1)).split([k, v], 1)
        return [keys.mT, values]

    return Rule(("attn_k_b.weight", "attn_v_b.weight"), ("self_attn.kv_b_proj.weight",), together, apart)
