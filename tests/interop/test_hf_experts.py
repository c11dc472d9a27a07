"""Families with mixtures of experts, and those with latent attention."""

from __future__ import annotations

import pytest

from .theirs import hold_to, their_model

EXPERTS = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
CASES = {
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3}),
    "mixtral_window": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}),
    "olmoe": ("olmoe", {"num_experts": 5, "num_experts_per_tok": 3}),
    "olmoe_normalised": ("olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_moe_normalised": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [0, 2]}),
    "qwen3_moe_steps": ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 2}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "swiglu_limit": 0.3,
            "rope_parameters": YARN,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_families_with_experts(case, tmp_path):
    model_type, fields = CASES[case]
    model = their_model(model_type, **fields)
    model.set_experts_implementation("eager")
    hold_to(model, tmp_path)


LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 6,
    "routed_scaling_factor": 1.7,
}
MSCALES = {"rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.707}}
GROUPS = {"n_group": 3, "topk_group": 2}
DEEPSEEK = {
    "v2": ("deepseek_v2", {}),
    "v2_groups": ("deepseek_v2", {**GROUPS, "topk_method": "group_limited_greedy", "n_shared_experts": 1}),
    "v2_yarn": ("deepseek_v2", {**MSCALES, "first_k_dense_replace": 0}),
    "v2_lite": ("deepseek_v2", {"q_lora_rank": None}),
    "v3": ("deepseek_v3", GROUPS),
    "v3_yarn": ("deepseek_v3", {**GROUPS, **MSCALES, "norm_topk_prob": False}),
}


@pytest.mark.parametrize("case", DEEPSEEK)
def test_deepseek(case, tmp_path):
    model_type, fields = DEEPSEEK[case]
    model = their_model(model_type, **LATENT | fields)
    model.set_experts_implementation("eager")
    hold_to(model, tmp_path)
