"""Dense families: logits, modes and round trips against transformers, a case for each setting that matters."""

from __future__ import annotations

import pytest

from .theirs import hold_to, their_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "multi_head": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 16},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn_attention_factor": {
        "rope_parameters": {**YARN, "attention_factor": 1.4, "beta_fast": 8.0, "truncate": False}
    },
    "yarn_mscale": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
}


@pytest.mark.parametrize("case", CASES)
def test_llama(case, tmp_path):
    hold_to(their_model("llama", **CASES[case]), tmp_path)


@pytest.mark.parametrize("window", [None, 7])
def test_mistral(window, tmp_path):
    hold_to(their_model("mistral", sliding_window=window), tmp_path)


WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
QWEN = {"plain": {}, "windows": WINDOWS, "yarn": {"rope_parameters": YARN}}


@pytest.mark.parametrize("case", QWEN)
def test_qwen2(case, tmp_path):
    hold_to(their_model("qwen2", **QWEN[case]), tmp_path)


@pytest.mark.parametrize("case", [*QWEN, "biases"])
def test_qwen3(case, tmp_path):
    hold_to(their_model("qwen3", **QWEN.get(case, {"attention_bias": True, "head_dim": 12})), tmp_path)


GEMMA = {"sliding_window": 7, "tie_word_embeddings": True, "query_pre_attn_scalar": 5}


@pytest.mark.parametrize("caps", [(50.0, 30.0), (1.5, 2.0), (None, None)])
def test_gemma2(caps, tmp_path):
    fields = dict(zip(("attn_logit_softcapping", "final_logit_softcapping"), caps))
    hold_to(their_model("gemma2", **GEMMA, **fields), tmp_path)


@pytest.mark.parametrize("scaled", [False, True])
def test_gemma3(scaled, tmp_path):
    linear = {"rope_type": "linear", "factor": 8.0} if scaled else {"rope_type": "default"}
    turns = {
        "full_attention": {"rope_theta": 9000.0, **linear},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    fields = {"rope_parameters": turns, "layer_types": ALTERNATING, "head_dim": 12}
    hold_to(their_model("gemma3_text", **GEMMA | fields), tmp_path)


def test_olmo2(tmp_path):
    hold_to(their_model("olmo2", head_dim=8), tmp_path)
