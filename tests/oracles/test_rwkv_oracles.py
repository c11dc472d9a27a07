"""RWKV against others: transformers' RWKV-4, and the official rwkv package for versions 5, 6 and 7."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import slipstream as ss
from slipstream.core.state import State


def load(name, prefix):
    with np.load(Path(__file__).with_name(f"{name}.npz")) as stored:
        return {n.removeprefix(prefix): torch.from_numpy(stored[n]) for n in stored.files if n.startswith(prefix)}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def transformers_config():
    from transformers import RwkvConfig

    return RwkvConfig(hidden_size=16, attention_hidden_size=12, intermediate_size=20, num_hidden_layers=1)


def randomised(module):
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module.eval()


@torch.no_grad()
def test_rwkv4_is_transformers_in_one_go_and_token_by_token():
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    theirs, x = randomised(RwkvSelfAttention(transformers_config())), 2 * torch.randn(2, 19, 16)
    ours = ss.mixer("rwkv4", d_model=16, d_inner=12)
    ours.load_state_dict(theirs.state_dict())
    want, _ = theirs(x)
    assert want.std() > 0.1
    close(ours(x), want)
    state = ours.init_state(2)
    for t in range(19):
        y, state = ours.step(x[:, t : t + 1], state)
        close(y, want[:, t : t + 1])


@torch.no_grad()
def test_the_channel_mix_of_rwkv4_is_transformers():
    from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward

    theirs, x = randomised(RwkvFeedForward(transformers_config())), torch.randn(2, 19, 16)
    ours = ss.mixer("rwkv_channel_mix", d_model=16, d_ff=20)
    ours.load_state_dict(theirs.state_dict())
    want, _ = theirs(x)
    assert want.std() > 0.1
    close(ours(x), want)


SETTINGS = {"rwkv5": {}, "rwkv6": {"shift_rank": 3, "decay_rank": 4}}


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_the_time_mix_is_the_official_package_from_any_state(name):
    stored = load("rwkv", f"{name}.")
    x, y, last, S, state = (stored.pop(n) for n in ("x", "y", "last", "S", "state"))
    ours = ss.mixer(name, d_model=16, n_heads=2, **SETTINGS[name])
    ours.load_state_dict(stored)
    got, after = ours.prefill(x[None], State({"S": S[None], "shift": last[None, None]}, torch.zeros(1).long()))
    assert y.std() > 0.1
    close(got[0], y)
    close(after["S"][0], state)
    close(after["shift"][0, 0], x[-1])


@torch.no_grad()
def test_the_channel_mix_of_rwkv7_is_the_official_package():
    stored = load("rwkv7", "channel_mix.")
    x, y, last = (stored.pop(n) for n in ("x", "y", "last"))
    ours = ss.mixer("rwkv7_channel_mix", d_model=16, d_ff=20)
    ours.load_state_dict(stored)
    got, _ = ours.prefill(x[None], State({"shift": last[None, None]}, torch.zeros(1).long()))
    close(got[0], y)
