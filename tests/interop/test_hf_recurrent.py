"""Families without attention: logits, modes and round trips against transformers.

Transformers' own answers are taken of whole prompts alone: where it goes on from a cache it is another computation, in Mamba
and Falcon Mamba a wrong one (a prefill after a prefill forgets the state, in 5.23). Ours is held to the whole prompt at every cut.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.interop.hf.write import save_hf

from .theirs import change, close, hold_to, in_pieces, seeded, tokens

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


@pytest.mark.parametrize("limit", [[0.0, math.inf], [0.0, {"__float__": "Infinity"}]])
def test_no_upper_limit_is_written_in_two_ways(limit, tmp_path):
    seeded("mamba2", **SIZES, **IDS, **HEADS, n_groups=1).save_pretrained(tmp_path)
    change(tmp_path, time_step_limit=limit)
    assert ss.load(tmp_path).stack.mixers()[0].config.dt_max is None


@pytest.mark.parametrize("limit", [[0.0], [0.0, "much"], [0.0, {"__float__": "NaN"}], 3, [True, False]])
def test_limits_that_are_none_are_refused(limit, tmp_path):
    seeded("mamba2", **SIZES, **IDS, **HEADS, n_groups=1).save_pretrained(tmp_path)
    change(tmp_path, time_step_limit=limit)
    with pytest.raises(InputError, match="time_step_limit"):
        ss.load(tmp_path)


def test_weights_that_a_family_has_none_of_cannot_be_written(tmp_path):
    seeded("falcon_mamba", **SIZES, **IDS, state_size=5).save_pretrained(tmp_path / "theirs")
    ours = ss.load(tmp_path / "theirs")
    torch.nn.init.constant_(ours.stack.mixers()[1].b_layernorm.weight, 1.5)
    with pytest.raises(InputError, match="b_layernorm"):
        save_hf(ours, tmp_path / "back", "falcon_mamba")


OURS = {
    "mamba": ("mamba/none", {}),
    "mamba2": ("mamba2(n_heads=4)/none", {"norm_eps": 1e-5, "tie_embeddings": False}),
    "rwkv": ("rwkv4/rwkv_channel_mix", {"norm": "layer", "norm_eps": 1e-5, "embedding_norm": True}),
    "xlstm": (
        "mlstm(conv_size=0, expand_k=0.5, n_heads=2)/swiglu",
        {"logit_cap": 30.0, "tie_embeddings": False},
    ),
    "lfm2": ("2*lfm2_conv, attention(qk_norm=true, n_heads=4)", {}),
    "jamba": (
        "mamba(norms=true), attention(rope_base=none, n_heads=2), mamba(norms=true)/moe(normalised=false, d_expert=96)",
        {},
    ),
    "falcon_h1": ("falcon_h1(n_heads=4, ssm_heads=2)", {}),
    "nemotron_h": (
        "mamba2(n_heads=4, norm_eps=1e-6)/none, mlp/none, attention(rope_base=none, n_heads=2)/none",
        {"tie_embeddings": False},
    ),
}


@pytest.mark.parametrize("family", OURS)
def test_what_slipstream_made_runs_in_transformers(family, tmp_path):
    pattern, settings = OURS[family]
    model = ss.language_model(pattern, n_layers=3, d_model=32, vocab_size=61, **settings).eval()
    with torch.no_grad():
        for parameter in model.embedding.parameters():
            parameter.mul_(20)
    assert save_hf(model, tmp_path) == family
    theirs, x = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval(), tokens(61)
    with torch.no_grad():
        want = theirs(input_ids=x, use_cache=False).logits
        close(model(x), want)
        close(in_pieces(ss.load(tmp_path), x), want)
