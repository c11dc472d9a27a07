"""The settings of attention and sliding_window, as trained models combine them, under every law."""

from __future__ import annotations

import pytest
import torch

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.laws import LAWS, Subject, registry
from slipstream.laws.modes import step_is_captured_whole

SETTINGS = {
    "gpt_oss": {"sinks": True, "qkv_bias": True, "o_bias": True},
    "gemma2": {"softcap": 2.0, "qk_scale": 0.3, "head_dim": 6},
    "qwen3_next": {"gated": True, "qk_norm": True, "rope_fraction": 0.5, "head_dim": 8},
    "no_positions": {"rope_base": None, "sinks": True, "softcap": 3.0, "gated": True},
}
MIXERS = ["attention", "sliding_window"]


class Setting(Subject):
    """A mixer at its tiny size with other settings."""

    def __init__(self, mixer: str, settings: str) -> None:
        super().__init__(ss.mixers()[mixer])
        self.settings = SETTINGS[settings]

    def build(self, **changes):
        return super().build(**{**self.settings, **changes})


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_laws_hold(mixer, settings):
    """All that run the mixer; how a step compiles does not depend on these."""
    torch.set_num_threads(1)
    for law in LAWS:
        if law is not step_is_captured_whole and law not in registry.LAWS:
            law(Setting(mixer, settings))


@pytest.mark.parametrize("changed", [{"sinks": True}, {"gated": True}, {"softcap": 1.0}, {"qk_scale": 2.0}])
@pytest.mark.parametrize("mixer", MIXERS)
def test_each_setting_changes_the_outputs(mixer, changed):
    subject = Subject(ss.mixers()[mixer])
    other = subject.build(**changed)
    other.load_state_dict(subject.mixer.state_dict(), strict=False)
    assert (other(subject.input()) - subject.mixer(subject.input())).abs().max() > 1e-3


def test_sinks_and_gates_start_harmless():
    """A new sink is one more key of logit zero; a new gate is near one half."""
    mixer = ss.mixer("attention", d_model=32, sinks=True, gated=True)
    assert torch.equal(mixer.sinks, torch.zeros(1))
    assert (mixer.g_proj(torch.randn(100, 32)).sigmoid() - 0.5).abs().mean() < 0.2


def test_mistakes_are_told():
    with pytest.raises(InputError, match=r"rope_fraction 0.25 of head_dim 12 .* is 3, and must be even"):
        ss.mixer("attention", d_model=24, n_heads=2, rope_fraction=0.25)
    with pytest.raises(InputError, match="softcap = 0"):
        ss.mixer("attention", d_model=24, softcap=0)


def test_heads_as_wide_as_one_likes():
    mixer = ss.mixer("attention", d_model=20, n_heads=3, n_kv_heads=1, head_dim=16)
    assert mixer(torch.randn(1, 5, 20)).shape == (1, 5, 20)
    assert mixer.state_bytes(10) == 10 * 2 * 16 * 4
