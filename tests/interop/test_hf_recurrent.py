"""Families without attention: logits, modes and round trips against transformers.

Transformers' own answers are taken of whole prompts alone: where it goes on from a cache it is another computation, in Mamba
and Falcon Mamba a wrong one (prefill after prefill forgets the state). Ours is held to the whole prompt at every cut.
"""

from __future__ import annotations

import pytest

from .theirs import hold_to, seeded

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.15}
IDS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {
    "plain": {"state_size": 5},
    "biases": {"use_bias": True, "use_conv_bias": False, "time_step_rank": 3, "conv_kernel": 3},
    "untied": {"tie_word_embeddings": False, "expand": 3, "layer_norm_epsilon": 1e-3},
}


@pytest.mark.parametrize("case", MAMBA)
def test_mamba(case, tmp_path):
    hold_to(seeded("mamba", **SIZES, **IDS, **MAMBA[case]), tmp_path)


@pytest.mark.parametrize("eps", [1e-6, 0.01])
def test_falcon_mamba(eps, tmp_path):
    hold_to(seeded("falcon_mamba", **SIZES, **IDS, state_size=5, mixer_rms_eps=eps), tmp_path)


HEADS = {"num_heads": 4, "head_dim": 16, "state_size": 6, "chunk_size": 8}
MAMBA2 = {
    "plain": {"n_groups": 1},
    "groups": {"n_groups": 2, "conv_kernel": 3, "use_bias": True, "use_conv_bias": False},
    "limits": {"n_groups": 4, "time_step_limit": (0.2, 0.9)},
    "least": {"n_groups": 4, "time_step_limit": (0.7, float("inf")), "tie_word_embeddings": True},
}


@pytest.mark.parametrize("case", MAMBA2)
def test_mamba2(case, tmp_path):
    hold_to(seeded("mamba2", **SIZES, **IDS, **HEADS, **MAMBA2[case]), tmp_path)


RWKV = {
    "plain": {},
    "wide": {"attention_hidden_size": 48, "intermediate_size": 40, "rescale_every": 0},
}


@pytest.mark.parametrize("case", RWKV)
def test_rwkv(case, tmp_path):
    """Initial weights are those of transformers: its decays and mixes have values of their own."""
    hold_to(seeded("rwkv", **{**SIZES, **IDS, **RWKV[case]}), tmp_path)


XLSTM = {
    "plain": {},
    "narrow": {"qk_dim_factor": 0.25, "gate_soft_cap": 2.0, "output_logit_soft_cap": 1.5, "norm_eps": 1e-3},
    "tied": {"tie_word_embeddings": True, "ffn_proj_factor": 1.3, "ffn_round_up_to_multiple_of": 8},
}


@pytest.mark.parametrize("case", XLSTM)
def test_xlstm(case, tmp_path):
    hold_to(seeded("xlstm", **SIZES, **IDS, num_heads=2, **XLSTM[case]), tmp_path)
