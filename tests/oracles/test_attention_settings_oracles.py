"""Attention layers of other models in transformers, whole and with their cache, with copied weights: gpt-oss (sinks, biases,
window), Gemma 2 (capped logits, a scale of its own, wide heads), Qwen3 (norms of q and k), Qwen3-Next (gate, partial rope).
"""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, GptOssConfig, Qwen3Config, Qwen3NextConfig
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

import slipstream as ss

from .transformers_layers import Theirs, agree_in_steps, agree_whole, random_layer

T, D, WINDOW = 19, 24, 7
SIZES = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "full_attention"],
    "attn_implementation": "eager",
}
OURS = {"d_model": D, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def gpt_oss_layer():
    config = GptOssConfig(**SIZES, rope_parameters=ROPE, attention_bias=True)
    ours = {"sinks": True, "qkv_bias": True, "o_bias": True}
    return gpt_oss.GptOssAttention(config, 0), gpt_oss.GptOssRotaryEmbedding(config), ours


def gemma2_layer():
    config = Gemma2Config(**SIZES, rope_parameters=ROPE, attn_logit_softcapping=1.5, query_pre_attn_scalar=5)
    return (
        gemma2.Gemma2Attention(config, 0),
        gemma2.Gemma2RotaryEmbedding(config),
        {"softcap": 1.5, "qk_scale": 5**-0.5},
    )


def qwen3_layer():
    config = Qwen3Config(**SIZES, rope_parameters=ROPE)
    return qwen3.Qwen3Attention(config, 0), qwen3.Qwen3RotaryEmbedding(config), {"qk_norm": True}


def qwen3_next_layer():
    config = Qwen3NextConfig(**SIZES, rope_parameters={**ROPE, "partial_rotary_factor": 0.5})
    ours = {"qk_norm": True, "gated": True, "rope_fraction": 0.5}
    return qwen3_next.Qwen3NextAttention(config, 0), qwen3_next.Qwen3NextRotaryEmbedding(config), ours


LAYERS = {"gpt_oss": gpt_oss_layer, "gemma2": gemma2_layer, "qwen3": qwen3_layer, "qwen3_next": qwen3_next_layer}
CASES = [(name, "attention") for name in LAYERS] + [(name, "sliding_window") for name in ("gpt_oss", "gemma2")]


def renamed(weights: dict[str, torch.Tensor], gated: bool) -> dict[str, torch.Tensor]:
    """Theirs under our names. Qwen3-Next: gates are beside the queries of each head, and norms keep their weights less one."""
    if gated:
        q, gate = weights.pop("q_proj.weight").unflatten(0, (4, 2, 8)).unbind(1)
        weights |= {"q_proj.weight": q.flatten(0, 1), "g_proj.weight": gate.flatten(0, 1)}
        weights |= {n: weights[n] + 1 for n in ("q_norm.weight", "k_norm.weight")}
    own = ("o_proj", "g_proj", "sinks")
    return {n if n.startswith(own) else f"qkv.{n}": w for n, w in weights.items()}


@pytest.fixture(params=CASES, ids="-".join)
def pair(request):
    name, mixer = request.param
    layer, rotary, settings = LAYERS[name]()
    layer, window = random_layer(layer, 0.5), {"window": WINDOW} if mixer == "sliding_window" else {}
    ours = ss.mixer(mixer, **OURS, **settings, **window).double().eval()
    ours.load_state_dict(renamed(dict(layer.state_dict()), "gated" in settings))
    return ours, Theirs(layer, rotary, window.get("window"))


@pytest.fixture
def x():
    return torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_outputs_and_gradients_are_theirs(pair, x):
    agree_whole(*pair, x)


def test_cached_decoding_is_theirs(pair, x):
    agree_in_steps(*pair, x, prompt=11)
