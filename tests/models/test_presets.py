"""Presets: names for patterns; their published models have the parameters and the memory that their makers state."""

from __future__ import annotations

import pytest
import torch

import slipstream as ss
from slipstream.core.cards import cards
from slipstream.core.mixer import Mixer
from slipstream.models.config import ModelConfig
from slipstream.models.pattern import parse
from slipstream.models.presets import PRESETS, expanded
from slipstream.models.presets.sizes import sizes, without_storage
from slipstream.models.sizing import n_parameters, sized

PUBLIC = sorted(name for name, preset in PRESETS.items() if preset.published)
SCALED = sorted(set(PRESETS) - set(cards()))
K256 = 262144


def test_a_name_is_its_pattern_and_a_mixers_name_stays_the_mixer():
    assert expanded("jamba") == PRESETS["jamba"].pattern
    assert parse("jamba") == parse(PRESETS["jamba"].pattern)
    assert ModelConfig(pattern=" samba ", n_layers=2, d_model=32).pattern == PRESETS["samba"].pattern
    for name in ("mamba", "mamba2", "rwkv7"):
        assert name in PRESETS and expanded(name) == name
        assert [part.name for part in parse(name)[0].parts] == [name, "swiglu"]
    assert expanded("3*jamba") == "3*jamba"  # a name alone


@pytest.mark.parametrize("name", PUBLIC)
def test_published_models_have_the_parameters_their_makers_state(name):
    """Some leave the embedding, or it and the head, out of what a token uses."""
    published = PRESETS[name].published
    found = sizes(published)
    assert found["parameters"] == pytest.approx(published.total, rel=0.025)
    table = published.settings["vocab_size"] * published.settings["d_model"]
    used = [found["active_parameters"] - n * table for n in (0, 1, 2)]
    stated = published.active or published.total
    assert min(abs(n - stated) for n in used) < 0.04 * stated


def cache_bytes(name: str, tokens: int) -> int:
    """Bytes of what grows."""

    def growing(mixer: Mixer) -> int:
        slots = [s for s in mixer.slots().values() if s.grows]
        return sum(torch.Size(s.after(tokens)).numel() * s.dtype_beside(torch.bfloat16).itemsize for s in slots)

    return sum(map(growing, without_storage(PRESETS[name].published).stack.mixers()))


def test_memory_is_what_the_papers_state():
    """Jamba (arXiv:2403.19887, table 1) at 256K tokens of 16 bits: Llama-2 128 GB, Mixtral (as Mistral) 32 GB, Jamba 4 GB."""
    assert without_storage(PRESETS["llama"].published).state_bytes(K256) == 128 * 2**30
    assert without_storage(PRESETS["mixtral"].published).state_bytes(K256) == 32 * 2**30
    assert cache_bytes("jamba", K256) == 4 * 2**30
    assert without_storage(PRESETS["jamba"].published).state_bytes(K256) < 1.005 * 4 * 2**30  # Mamba adds 15 MiB


def test_latent_attention_keeps_70272_bytes_a_token():
    """DeepSeek-V3 (arXiv:2505.09343, table 1): 70.272 KB a token, in 16 bits."""
    model = without_storage(PRESETS["deepseek_v3"].published)
    assert model.state_bytes(1000) == 1000 * 70272


@pytest.mark.parametrize("name", ["griffin", "mamba", "mamba2", "falcon_mamba", "rwkv7", "xlstm"])
def test_memory_does_not_grow(name):
    by_length = sizes(PRESETS[name].published)["state_bytes"]
    assert len(set(by_length.values())) == 1


@pytest.mark.parametrize("name", SCALED)
def test_presets_are_models_at_a_small_size(name):
    model = ss.language_model(name, n_layers=len(parse(name)), d_model=32)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        _, state = model.prefill(tokens[:, :8], model.init_state(1, 9))
        logits, _ = model.step(tokens[:, 8:], state)
        torch.testing.assert_close(logits, model(tokens)[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "jamba",
        "samba",
        "hymba",
        "qwen3_next",
        "llama",
        "deepseek_v3",
        "granite_hybrid",
        "kimi_linear",
        "lfm2",
        "zamba2",
    ],
)
def test_presets_are_compared_at_equal_parameters(name):
    config = sized(name, 3_000_000, 256, None, None)
    assert n_parameters(config) == pytest.approx(3_000_000, rel=0.02)
