"""Families with recurrent and softmax layers in one model: logits, modes and round trips against transformers.

Transformers' own answers are taken of whole prompts alone. Ours is held to the whole prompt at every cut, also in Jamba, where
theirs forgets the state of Mamba when a prefill follows a prefill (5.23).
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.interop.hf.write import save_hf

from .theirs import COMMON, close, hold_to, in_pieces, seeded, their_model, tokens

QWEN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}}
QWEN3_NEXT = {
    "plain": {},
    "dense_too": {"mlp_only_layers": [1], "shared_expert_intermediate_size": 48, "norm_topk_prob": False},
    "kinds": {"layer_types": ["full_attention", "linear_attention"] * 2, "linear_num_value_heads": 2, **TURNED},
}


@pytest.mark.parametrize("case", QWEN3_NEXT)
def test_qwen3_next(case, tmp_path):
    model = their_model("qwen3_next", **QWEN | QWEN3_NEXT[case])
    model.set_experts_implementation("eager")
    hold_to(model, tmp_path)


@pytest.mark.parametrize("case", QWEN3_NEXT)
def test_qwen3_5(case, tmp_path):
    fields = {
        k: v for k, v in (QWEN | QWEN3_NEXT[case]).items() if "expert" not in k and not k.startswith(("m", "norm"))
    }
    hold_to(their_model("qwen3_5_text", **fields), tmp_path)


QWEN3_5_MOE = {"plain": {}, "kinds": QWEN3_NEXT["kinds"], "wide shared one": {"shared_expert_intermediate_size": 48}}


@pytest.mark.parametrize("case", QWEN3_5_MOE)
def test_qwen3_5_moe(case, tmp_path):
    model = their_model("qwen3_5_moe_text", **QWEN | QWEN3_5_MOE[case])
    model.set_experts_implementation("eager")
    hold_to(model, tmp_path)


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_qwen3_5_beside_a_network_for_images(kind, tmp_path):
    """As it is published: the text's settings and tensors one deeper, experts of a layer as one tensor, and tensors that are no
    part of it."""
    dense = {k: v for k, v in QWEN.items() if "expert" not in k and not k.startswith("m")}
    model = their_model(f"{kind}_text", **(QWEN if kind.endswith("moe") else dense))
    model.save_pretrained(tmp_path)
    tensors = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if ".experts." not in n}
    tensors |= {n: t for n, t in model.state_dict().items() if ".experts." in n}
    tensors = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
    others = {"model.visual.patch_embed.proj.weight": torch.zeros(2), "mtp.norm.weight": torch.zeros(2)}
    save_file(tensors | others, tmp_path / "model.safetensors", {"format": "pt"})
    text = json.loads((tmp_path / "config.json").read_text())
    text["rope_parameters"] |= {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    about = {"model_type": kind, "text_config": text, "vision_config": {"depth": 1}, "image_token_id": 60}
    (tmp_path / "config.json").write_text(json.dumps(about))
    x = tokens(61)
    with torch.no_grad():
        close(ss.load(tmp_path)(x), model(input_ids=x, use_cache=False).logits)


GRIFFIN = {
    "plain": {},
    "wide": {"lru_width": 48, "block_types": ["recurrent", "attention"], "num_key_value_heads": 1, "conv1d_width": 3},
    "biases": {"attention_bias": True, "logits_soft_cap": 2.0, **TURNED},
}


@pytest.mark.parametrize("case", GRIFFIN)
def test_recurrent_gemma(case, tmp_path):
    fields = {
        "attention_window_size": 7,
        "tie_word_embeddings": True,
        **GRIFFIN[case],
    }
    hold_to(their_model("recurrent_gemma", **fields), tmp_path)


LFM2 = {
    "plain": {"full_attn_idxs": [2], "block_multiple_of": 8},
    "biases": {"layer_types": ["conv", "full_attention"] * 2, "conv_bias": True, "conv_L_cache": 4},
    "exact": {"full_attn_idxs": [0, 2], "block_auto_adjust_ff_dim": False, "norm_eps": 1e-3},
}


@pytest.mark.parametrize("case", LFM2)
def test_lfm2(case, tmp_path):
    fields = {name: value for name, value in COMMON.items() if name != "rms_norm_eps"}
    hold_to(seeded("lfm2", **fields | LFM2[case]), tmp_path)


LFM2_MOE = {
    "plain": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "dense": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 3, "routed_scaling_factor": 1.7},
    "free": {"layer_types": ["full_attention", "conv"] * 2, "use_expert_bias": False, "norm_topk_prob": False},
}


@pytest.mark.parametrize("case", LFM2_MOE)
def test_lfm2_moe(case, tmp_path):
    fields = {name: value for name, value in COMMON.items() if name != "rms_norm_eps"}
    fields |= {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_dense_layers": 1}
    model = seeded("lfm2_moe", **fields | LFM2_MOE[case])
    model.set_experts_implementation("eager")
    hold_to(model, tmp_path)


SSD = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 6, "mamba_chunk_size": 8}
BAMBA = {
    "plain": {"attn_layer_indices": [1]},
    "groups": {"attn_layer_indices": [0, 3], "mamba_n_groups": 2, "attention_bias": True, "mlp_bias": True},
    "limits": {
        "attn_layer_indices": [2],
        "mamba_proj_bias": True,
        "mamba_conv_bias": False,
        "time_step_limit": [0.3, 1.0],
    },
}


@pytest.mark.parametrize("case", BAMBA)
def test_bamba(case, tmp_path):
    hold_to(their_model("bamba", **SSD, **BAMBA[case]), tmp_path)


JAMBA = {
    "plain": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "one": {"attn_layer_period": 9, "attn_layer_offset": 2, "expert_layer_period": 3, "expert_layer_offset": 0},
    "dense": {"attn_layer_period": 3, "attn_layer_offset": 0, "num_experts": 1, "num_experts_per_tok": 1},
    "biases": {"attn_layer_offset": 0, "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 3},
}


@pytest.mark.parametrize("case", JAMBA)
def test_jamba(case, tmp_path):
    model = their_model("jamba", **{"num_experts": 5, "mamba_d_state": 5} | JAMBA[case])
    model.set_experts_implementation("eager")
    hold_to(model, tmp_path)


MULTIPLIERS = {"embedding_multiplier": 3, "logits_scaling": 6, "residual_multiplier": 0.22, "attention_multiplier": 0.3}
KINDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
GRANITE = {
    "plain": {},
    "dense": {"num_local_experts": 0, "shared_intermediate_size": 40, "position_embedding_type": "rope"},
    "multipliers": {**MULTIPLIERS, "attention_bias": True, "shared_intermediate_size": 96, "mamba_n_groups": 2},
}


@pytest.mark.parametrize("case", GRANITE)
def test_granitemoehybrid(case, tmp_path):
    fields = {"layer_types": KINDS, "num_local_experts": 5, "shared_intermediate_size": 48, **SSD, **GRANITE[case]}
    model = their_model("granitemoehybrid", **fields)
    model.set_experts_implementation("eager")
    hold_to(model, tmp_path)


NEMOTRON = {
    "words": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"]},
    "letters": {"hybrid_override_pattern": "M*-M", "use_bias": True, "use_conv_bias": False, "mlp_bias": True},
    "limits": {"hybrid_override_pattern": "*M-", "time_step_min": 0.4, "mlp_hidden_act": "silu", "n_groups": 1},
}
NEMOTRON_SIZES = {"mamba_num_heads": 4, "mamba_head_dim": 12, "ssm_state_size": 6, "n_groups": 2, "chunk_size": 8}


@pytest.mark.parametrize("case", NEMOTRON)
def test_nemotron_h(case, tmp_path):
    fields = {k: v for k, v in COMMON.items() if k != "num_hidden_layers"}
    hold_to(seeded("nemotron_h", **fields | NEMOTRON_SIZES | NEMOTRON[case]), tmp_path)


FALCON_SCALES = {
    "embedding_multiplier": 2.5,
    "lm_head_multiplier": 0.4,
    "key_multiplier": 0.6,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 1.4,
    "ssm_out_multiplier": 0.5,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
    "mlp_multipliers": [1.3, 0.6],
}
FALCON_H1 = {
    "plain": {},
    "scales": FALCON_SCALES,
    "before": {"mamba_rms_norm": True, "mamba_n_groups": 2, "mlp_bias": True},
    "after": {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_d_ssm": 40, "mamba_d_head": 10},
}


@pytest.mark.parametrize("case", FALCON_H1)
def test_falcon_h1(case, tmp_path):
    fields = {"mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_ssm": 48, "mamba_d_state": 6, "mamba_chunk_size": 8}
    hold_to(their_model("falcon_h1", **fields | FALCON_H1[case]), tmp_path)


KIMI = {
    "plain": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "counted": {
        "linear_attn_config": {
            "full_attn_layers": [2],
            "kda_layers": [1, 3, 4],
            "num_heads": 3,
            "head_dim": 6,
            "short_conv_kernel_size": 3,
        },
        "first_k_dense_replace": 2,
    },
    "groups": {"num_expert_group": 3, "topk_group": 2, "moe_renormalize": False, "q_lora_rank": 12},
}
KIMI_SIZES = {
    "linear_num_heads": 2,
    "linear_head_dim": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_experts": 6,
    "num_experts_per_token": 2,
    "num_shared_experts": 2,
    "moe_intermediate_size": 24,
    "num_key_value_heads": 4,
    "num_hidden_layers": 5,
}


@pytest.mark.parametrize("case", KIMI)
def test_kimi_linear(case, tmp_path):
    layers = {"num_hidden_layers": 4} if case != "groups" else {}
    fields = {k: v for k, v in COMMON.items() if k != "head_dim"} | KIMI_SIZES | layers | KIMI[case]
    model = seeded("kimi_linear", **fields)
    model.set_experts_implementation("eager")
    hold_to(model, tmp_path)


OLMO_SIZES = {k: v for k, v in QWEN.items() if k.startswith("linear_")} | {"head_dim": 8, "linear_value_head_dim": 3}
OLMO = {
    "plain": {},
    "unplaced": {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "linear_allow_neg_eigval": False},
    "kinds": {"layer_types": ["full_attention", "linear_attention"] * 2, "attention_bias": True},
}


@pytest.mark.parametrize("case", OLMO)
def test_olmo_hybrid(case, tmp_path):
    hold_to(their_model("olmo_hybrid", **OLMO_SIZES | OLMO[case]), tmp_path)


def test_olmo_hybrid_with_wide_values(tmp_path):
    """Transformers cuts the convolution of q, k and v into equal parts when it writes, and joins whatever it reads."""
    model, x = their_model("olmo_hybrid", **OLMO_SIZES | {"linear_value_head_dim": 10}), tokens(61)
    model.save_pretrained(tmp_path / "theirs")
    ours = ss.load(tmp_path / "theirs")
    save_hf(ours, tmp_path / "back", "olmo_hybrid")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    with torch.no_grad():
        want = model(input_ids=x, use_cache=False).logits
        close(ours(x), want)
        close(in_pieces(ours, x), want)
        close(ss.load(tmp_path / "back")(x), want)
        close(again(input_ids=x, use_cache=False).logits, want, 1e-6)


FACTORS = {
    f"{kind}_{factor}_factor": x
    for kind in ("full_attn", "linear_attn", "mlp")
    for factor, x in (("alpha", 3.5), ("beta", 0.8))
}
MINIMAX = {
    "plain": {"num_local_experts": 5},
    "factors": {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "head_dim": 12, **FACTORS},
}


@pytest.mark.parametrize("case", MINIMAX)
def test_minimax(case, tmp_path):
    """Lightning attention's tables of decays are in transformers' files and not in ours: they follow from the settings."""
    model = their_model("minimax", block_size=8, **MINIMAX[case])
    model.set_experts_implementation("eager")
    hold_to(model, tmp_path)


def test_minimax_with_factors_of_their_own_is_refused(tmp_path):
    model = their_model("minimax", full_attn_alpha_factor=2.0)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="several alpha_factors"):
        ss.load(tmp_path)
