"""Attention with small caches: MLA against DeepSeek's layers in transformers, with their cache; the others against golden arrays,
made by make_latent_attention.py beside this file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

import slipstream as ss

from . import make_latent_attention as maker
from .transformers_layers import Theirs, agree_in_steps, agree_whole, random_layer

STORED = np.load(Path(__file__).with_name("latent_attention.npz"))
T, D = 19, 24
SIZES = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "num_hidden_layers": 2,
    "attn_implementation": "eager",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
OURS = {"d_model": D, "n_heads": 4, "kv_rank": 10, "nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 5}
LAYERS = {
    "v2": (DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding, 9),
    "v2_without_q_rank": (DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding, None),
    "v3": (DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding, 9),
}


def half_split(rows: torch.Tensor) -> torch.Tensor:
    """Rows of pairs (0, 1), (2, 3), ... as rows of pairs (0, 2), (1, 3)."""
    return rows.unflatten(-2, (-1, 2)).transpose(-3, -2).flatten(-3, -2)


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Theirs under our names, turned rows in our order."""
    name = "q_b_proj.weight" if "q_b_proj.weight" in weights else "q_proj.weight"
    q, down = weights[name].unflatten(0, (4, -1)), weights["kv_a_proj_with_mqa.weight"]
    weights[name] = torch.cat([q[:, :6], half_split(q[:, 6:])], 1).flatten(0, 1)
    weights["kv_a_proj_with_mqa.weight"] = torch.cat([down[:10], half_split(down[10:])])
    return {f"latent.{n}": w for n, w in weights.items()}


@pytest.fixture(params=LAYERS)
def pair(request):
    config_class, layer_class, rotary_class, q_rank = LAYERS[request.param]
    config = config_class(**SIZES, q_lora_rank=q_rank)
    layer = random_layer(layer_class(config, 0), 0.7)
    ours = ss.mixer("mla", q_rank=q_rank, **OURS).double().eval()
    ours.load_state_dict(renamed(dict(layer.state_dict())))
    return ours, Theirs(layer, rotary_class(config))


@pytest.fixture
def x():
    return torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_mla_and_its_gradients_are_deepseeks(pair, x):
    agree_whole(*pair, x)


def test_cached_decoding_of_mla_is_deepseeks(pair, x):
    agree_in_steps(*pair, x, prompt=11)


def test_golden_arrays_are_what_their_script_makes():
    made = maker.golden()
    assert set(made) == set(STORED.files)
    for key, array in made.items():
        np.testing.assert_allclose(STORED[key], array, rtol=1e-12, atol=1e-12)


SETTINGS = {
    "grouped_latent_attention": {
        "n_latents": maker.LATENTS,
        "kv_rank": maker.RANK,
        "q_rank": maker.Q_RANK,
        "nope_head_dim": maker.HEAD,
        "rope_head_dim": maker.ROPE,
    },
    "grouped_tied_attention": {"n_kv_heads": maker.TIED},
    "tpa": {"head_dim": maker.HEAD} | {f"{n}_rank": rank for n, rank in maker.RANKS.items()},
}


def ours_for(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """TPA's authors turn backwards: mirrored second halves of b turn forwards alike."""
    if name == "tpa":
        for line in ("b_proj.q.weight", "b_proj.k.weight"):
            weights[line].unflatten(0, (-1, maker.HEAD))[:, maker.HEAD // 2 :] *= -1
    return {f"latent.{n}": w for n, w in weights.items()} if name == "grouped_latent_attention" else weights


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_and_steps_are_the_papers(name):
    stored = {n.removeprefix(f"{name}/"): torch.from_numpy(STORED[n]) for n in STORED.files if n.startswith(f"{name}/")}
    x, want = stored.pop("x"), stored.pop("y")
    assert want.std() > 0.5
    mixer = ss.mixer(name, d_model=x.shape[2], n_heads=maker.H, **SETTINGS[name]).double().eval()
    mixer.load_state_dict(ours_for(name, {n.removeprefix("w/"): w for n, w in stored.items()}))
    torch.testing.assert_close(mixer(x), want, rtol=1e-10, atol=1e-10)
    y, state = mixer.prefill(x[:, :9], mixer.init_state(len(x), x.shape[1]))
    ys = [y]
    for t in range(9, x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), want, rtol=1e-10, atol=1e-10)
