"""Hybrids where one half is all or nothing: they are then the mixer of the other half."""

from __future__ import annotations

import pytest
import torch

import slipstream as ss

B, T, D = 2, 23, 16
HEADS = {"d_model": D, "n_heads": 4, "n_kv_heads": 2}


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def same(one, other, x):
    """Outputs and gradients."""
    weights = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    for got, want in zip(*((y := m(x), *torch.autograd.grad((y * weights).sum(), x)) for m in (one, other))):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_lolcats_whose_window_holds_everything_is_attention(x):
    hybrid = ss.mixer("lolcats_attention", **HEADS, window=T).double()
    attention = ss.mixer("attention", **HEADS).double()
    attention.load_state_dict({n: p for n, p in hybrid.state_dict().items() if n in attention.state_dict()})
    same(hybrid, attention, x)


def test_falcon_h1_without_mamba_is_attention_and_without_attention_mamba2(x):
    hybrid = ss.mixer("falcon_h1", **HEADS, ssm_d_state=8, ssm_out=0.0).double()
    attention = ss.mixer("attention", **HEADS).double()
    attention.load_state_dict({n: p for n, p in hybrid.state_dict().items() if n in attention.state_dict()})
    same(hybrid, attention, x)
    hybrid = ss.mixer("falcon_h1", **HEADS, ssm_d_state=8, ssm_norm="after_gate", attention_out=0.0).double()
    mamba2 = ss.mixer("mamba2", d_model=D, d_state=8).double()
    mamba2.load_state_dict({n.removeprefix("mamba."): p for n, p in hybrid.state_dict().items() if "mamba." in n})
    same(hybrid, mamba2, x)


def test_a_multiplier_is_a_factor_on_a_matrix(x):
    """So that a trained model needs none."""
    with_factors = ss.mixer(
        "falcon_h1", **HEADS, ssm_d_state=8, key_scale=0.5, ssm_in=1.5, ssm_z=0.7, ssm_out=0.3
    ).double()
    without = ss.mixer("falcon_h1", **HEADS, ssm_d_state=8).double()
    weights = with_factors.state_dict() | {
        "qkv.k_proj.weight": 0.5 * with_factors.qkv.k_proj.weight.detach(),
        "mamba.out_proj.weight": 0.3 * with_factors.mamba.out_proj.weight.detach(),
    }
    rows = torch.ones(weights["mamba.in_proj.weight"].shape[0], 1, dtype=x.dtype)
    rows[: 2 * D] = 0.7
    weights["mamba.in_proj.weight"] = 1.5 * rows * weights["mamba.in_proj.weight"]
    without.load_state_dict(weights)
    same(with_factors, without, x)


def test_steps_of_mamba2_stay_within_their_limits():
    """A step size that is never below dt_min lets a state fade even where the weights would stop time."""
    for limits, want in (({}, 0.0), ({"dt_min": 0.25}, 0.25), ({"dt_min": 0.0, "dt_max": 1e-9}, 0.0)):
        mixer = ss.mixer("mamba2", d_model=D, d_state=4, n_heads=2, conv_bias=False, **limits).double()
        with torch.no_grad():
            mixer.dt_bias.fill_(-40.0)
            mixer.A_log.zero_()
            state = mixer.init_state(1)
            state.slots["S"].fill_(1.0)
            _, after = mixer.prefill(torch.zeros(1, 1, D, dtype=torch.float64), state)
        torch.testing.assert_close(after["S"], torch.full_like(after["S"], -want).exp(), rtol=1e-6, atol=1e-6)
