"""Hybrid mixers, and the settings of Mamba and Mamba-2 that hybrid checkpoints need, against outside code with the same weights.

transformers' layers where it has them; stored arrays of numpy loops, made by make_hybrids.py, for the others. All in float64
where transformers allows it; its Mamba layers compute parts of themselves in float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BambaConfig,
    DynamicCache,
    FalconH1Config,
    FalconMambaConfig,
    JambaConfig,
    Lfm2Config,
    NemotronHConfig,
    Zamba2Config,
)
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1ForCausalLM
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

import slipstream as ss

from . import make_hybrids

HERE = Path(__file__).parent
B, T, D = 2, 37, 32
SSM = {"hidden_size": D, "num_hidden_layers": 2}
OF_MAMBA2 = {"d_model": D, "d_state": 8, "n_heads": 8}


@pytest.fixture
def x():
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def shaken(module, size=0.3):
    """Every weight moved, so that each of them matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.where(p.abs() < 8, p, 0))  # some are left as memory was
            p.add_(size * torch.randn_like(p))
    return module.eval()


def agree(ours, theirs, tol=2e-5):
    scale = theirs.std().item()
    assert scale > 0.1  # the mechanism matters
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=tol, atol=tol)


def with_weights(name, weights, **settings):
    ours = ss.mixer(name, **settings).eval()
    ours.load_state_dict(weights)
    return ours


def prefill_then_steps(mixer, x, n):
    """Outputs of a prefill of n tokens and single steps after it."""
    y, state = mixer.prefill(x[:, :n], mixer.init_state(len(x), x.shape[1]))
    ys = [y]
    for t in range(n, x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    return torch.cat(ys, 1)


def bamba():
    config = BambaConfig(
        **SSM, num_attention_heads=4, num_key_value_heads=2, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8
    )
    return BambaMixer(config, 0), "mamba2", {**OF_MAMBA2, "conv_bias": True}, config


def nemotron_h():
    """Its inner width is that of its heads, and transformers keeps steps above 0.001."""
    config = NemotronHConfig(
        hidden_size=D, layers_block_type=["mamba"], mamba_num_heads=6, mamba_head_dim=8, ssm_state_size=8, n_groups=2
    )
    settings = {**OF_MAMBA2, "n_heads": 6, "d_inner": 48, "n_groups": 2, "dt_min": 0.001}
    return NemotronHMamba2Mixer(config, 0), "mamba2", settings, config


def zamba2():
    config = Zamba2Config(
        **SSM,
        layers_block_type=["mamba"] * 2,
        n_mamba_heads=8,
        mamba_d_state=8,
        mamba_ngroups=2,
        num_attention_heads=4,
        time_step_min=0.3,
    )
    return Zamba2MambaMixer(config, 0), "mamba2", {**OF_MAMBA2, "n_groups": 2, "dt_min": 0.3}, config


def falcon_h1_mamba(norm):
    one = {"ssm_multipliers": [1.0] * 5, "ssm_in_multiplier": 1.0}
    config = falcon_h1_config(mamba_rms_norm=norm != "none", mamba_norm_before_gate=norm == "before_gate", **one)
    layer = FalconH1ForCausalLM(config).model.layers[0].mamba
    return layer, "mamba2", {**OF_MAMBA2, "d_inner": 48, "n_heads": 6, "n_groups": 2, "norm": norm}, config


def jamba():
    config = JambaConfig(**SSM, mamba_d_state=8, mamba_dt_rank=3, num_attention_heads=4, num_key_value_heads=2)
    return JambaMambaMixer(config, 0), "mamba", {"d_model": D, "d_state": 8, "dt_rank": 3, "norms": True}, config


def falcon_mamba():
    config = FalconMambaConfig(**SSM, state_size=8, expand=2, time_step_rank=3, intermediate_size=64)
    return (
        FalconMambaMixer(config, 0, initialize_mixer_weights=False),
        "mamba",
        {"d_model": D, "d_state": 8, "dt_rank": 3, "norms": True},
        config,
    )


def lfm2():
    config = Lfm2Config(
        **SSM, num_attention_heads=4, num_key_value_heads=2, conv_bias=True, layer_types=["conv", "full_attention"]
    )
    return Lfm2ShortConv(config, 0), "lfm2_conv", {"d_model": D, "bias": True}, config


LAYERS = {
    "bamba": bamba,
    "nemotron_h": nemotron_h,
    "zamba2": zamba2,
    "falcon_h1, no norm": lambda: falcon_h1_mamba("none"),
    "falcon_h1, norm first": lambda: falcon_h1_mamba("before_gate"),
    "falcon_h1, gate first": lambda: falcon_h1_mamba("after_gate"),
    "jamba": jamba,
    "falcon_mamba": falcon_mamba,
    "lfm2": lfm2,
}
STEPS_UNLIKE = "nemotron_h", "zamba2"  # transformers' single steps do not keep the step size above its least


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_recurrent_layers_are_theirs_whole_and_cached(name, x):
    layer, mixer, settings, config = LAYERS[name]()
    theirs = shaken(layer)
    ours = ss.mixer(mixer, **settings).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not [n for n in unexpected if n != "mup_vector"]
    assert all(n.endswith("layernorm.weight") for n in missing)  # Falcon Mamba's norms have no weights: ones
    want = theirs(x)
    agree(ours(x), want)
    agree(prefill_then_steps(ours, x, 20), want)
    if name not in STEPS_UNLIKE:
        cache = DynamicCache(config=config)
        key = "past_key_values" if name == "lfm2" else "cache_params"
        pieces = [theirs(x[:, :20], **{key: cache})]
        pieces += [theirs(x[:, t : t + 1], **{key: cache}) for t in range(20, T)]
        agree(torch.cat(pieces, 1), want)


def falcon_h1_config(**changes):
    settings = {
        **SSM,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 11,
        "head_dim": 8,
        "mamba_d_ssm": 48,
        "mamba_n_heads": 6,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "ssm_multipliers": [0.5, 1.3, 0.7, 1.6, 0.9],
        "attention_in_multiplier": 1.2,
        "attention_out_multiplier": 0.8,
        "key_multiplier": 0.6,
        "ssm_in_multiplier": 1.1,
        "ssm_out_multiplier": 0.7,
        "attn_implementation": "eager",
    }
    return FalconH1Config(**settings | changes)


OURS = {
    "ssm_z": 0.5,
    "ssm_x": 1.3,
    "ssm_B": 0.7,
    "ssm_C": 1.6,
    "ssm_dt": 0.9,
    "attention_in": 1.2,
    "attention_out": 0.8,
    "key_scale": 0.6,
    "ssm_in": 1.1,
    "ssm_out": 0.7,
}


@pytest.mark.parametrize("norm", ["none", "before_gate"])
@torch.no_grad()
def test_falcon_h1_is_theirs_whole_and_cached(norm, x):
    config = falcon_h1_config(mamba_rms_norm=norm != "none", mamba_norm_before_gate=True)
    model = FalconH1ForCausalLM(config)
    layer = shaken(model.model.layers[0])
    layer.input_layernorm.weight.fill_(1)
    layer.feed_forward.down_proj.weight.zero_()  # the feed-forward is a mixer of its own here
    theirs = {n: t for n, t in layer.state_dict().items() if n.startswith(("mamba.", "self_attn."))}
    renamed = {n.replace("self_attn.o_proj", "o_proj").replace("self_attn.", "qkv."): t for n, t in theirs.items()}
    ours = with_weights(
        "falcon_h1",
        {n: t for n, t in renamed.items() if "mup_vector" not in n},
        d_model=D,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        ssm_d_inner=48,
        ssm_heads=6,
        ssm_d_state=8,
        ssm_n_groups=2,
        ssm_norm=norm,
        **OURS,
    )

    def said(piece, past, cache):
        positions = torch.arange(past, past + piece.shape[1])[None].expand(len(piece), -1)
        mask = torch.full((piece.shape[1], past + piece.shape[1]), -torch.inf).triu(past + 1)[None, None]
        turns = model.model.rotary_emb(piece, positions)
        return layer(piece, mask, None, positions, cache, cache is not None, turns)[0] - piece

    normed = layer.input_layernorm(x)
    want = said(x, 0, None)
    agree(ours(normed), want)
    agree(prefill_then_steps(ours, normed, 20), want)
    cache = DynamicCache(config=config)
    pieces = [said(x[:, :20], 0, cache)] + [said(x[:, t : t + 1], t, cache) for t in range(20, T)]
    agree(torch.cat(pieces, 1), want)


SETTINGS = {
    "hymba": {"d_state": 3, "dt_rank": 1, "conv_size": 3, "n_meta": 3},
    "lolcats_attention": {"feature_dim": 3},
    "liger_attention": {},
    "head_split": {"n_linear": 2},
}


def test_stored_arrays_are_what_their_script_makes():
    stored, made = np.load(HERE / "hybrids.npz"), make_hybrids.make()
    assert set(stored) == set(made)
    for key in made:
        np.testing.assert_allclose(stored[key], made[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_mixer_is_the_stored_numpy_loop(name):
    stored = {
        k.partition("/")[2]: torch.from_numpy(v) for k, v in np.load(HERE / "hybrids.npz").items() if k.startswith(name)
    }
    x, y = stored.pop("x"), stored.pop("y")
    ours = ss.mixer(name, d_model=8, n_heads=4, n_kv_heads=2, window=4, **SETTINGS[name]).double().eval()
    ours.load_state_dict(stored)
    agree(ours(x), y, 1e-10)
    agree(prefill_then_steps(ours, x, 6), y, 1e-10)
