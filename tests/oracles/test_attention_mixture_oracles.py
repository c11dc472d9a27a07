"""Mixtures of attention: transformers' JetMoe with copied weights, forward and cached; the others against stored arrays.

Stored arrays, made by make_attention_mixtures.py, are float64 numpy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, JetMoeConfig
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeRotaryEmbedding

import slipstream as ss

SETTINGS = {
    "mixture_of_heads": {"n_heads": 6, "n_kv_heads": 3, "n_shared_heads": 2, "top_k": 3, "rope_base": None},
    "mixture_of_heads routed": {"n_heads": 6, "n_kv_heads": 3, "n_shared_heads": 0, "top_k": 2, "rope_base": None},
    "switchhead": {"n_heads": 2, "n_experts": 3, "top_k": 2, "head_dim": 4},
    "mosa": {"n_heads": 3, "n_dense_heads": 1, "sparsity": 4},
    "mosa first": {"n_heads": 3, "n_dense_heads": 0, "sparsity": 5, "include_first": True},
    "mosa encoder": {"n_heads": 3, "n_dense_heads": 2, "sparsity": 2, "causal": False},
}


def stored(name):
    """Input, output, and the mixer with the stored weights."""
    arrays = np.load(Path(__file__).with_name("attention_mixtures.npz"))
    found = {n.partition("/")[2]: torch.from_numpy(arrays[n]) for n in arrays if n.partition("/")[0] == name}
    x, y = found.pop("x"), found.pop("y")
    mixer = ss.mixer(name.partition(" ")[0], d_model=x.shape[-1], **SETTINGS[name]).double().eval()
    mixer.load_state_dict(found)
    return x, y, mixer


@pytest.mark.parametrize("name", SETTINGS)
def test_a_whole_pass_is_theirs(name):
    x, y, mixer = stored(name)
    assert y.std() > 0.1
    torch.testing.assert_close(mixer(x), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixer.reference(x), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in SETTINGS if not n.startswith("mosa")])
def test_prefill_and_steps_are_their_whole_pass(name):
    x, y, mixer = stored(name)
    got, state = mixer.prefill(x[:, :13], mixer.init_state(len(x), x.shape[1]))
    parts = [got]
    for t in range(13, x.shape[1]):
        got, state = mixer.step(x[:, t : t + 1], state)
        parts.append(got)
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=1e-10, atol=1e-10)


D, TOKENS = 24, 20
RENAMED = {
    "router.weight": "experts.router.layer.weight",
    "q_experts": "experts.input_linear.weight",
    "o_experts": "experts.output_linear.weight",
    "bias": "experts.bias",
    "kv_proj.weight": "kv_proj.weight",
}


class Theirs:
    """JetMoe's attention with random weights, in float64; its gates and angles are float32, hence the tolerance."""

    def __init__(self):
        sizes = {"hidden_size": D, "num_key_value_heads": 2, "kv_channels": 6, "num_local_experts": 5}
        config = JetMoeConfig(**sizes, num_experts_per_tok=3, rope_theta=10000.0, attn_implementation="eager")
        torch.manual_seed(0)
        self.layer, self.rotary = JetMoeAttention(config, 0).eval().double(), JetMoeRotaryEmbedding(config)
        for p in self.layer.parameters():
            torch.nn.init.normal_(p, 0, 0.4)

    def __call__(self, x, past=0, cache=None):
        places = torch.arange(past, past + x.shape[1])
        unseen = torch.arange(past + x.shape[1]) > places[:, None]
        mask = torch.zeros(unseen.shape, dtype=x.dtype).masked_fill(unseen, -torch.inf)[None, None]
        turns = self.rotary(x, places[None])
        return self.layer(x, attention_mask=mask, position_embeddings=turns, past_key_values=cache)[0]


@pytest.fixture
def pair():
    theirs = Theirs()
    ours = ss.mixer("mixture_of_attention_heads", d_model=D, n_experts=5, top_k=3, n_kv_heads=2, head_dim=6)
    ours, weights = ours.double().eval(), theirs.layer.state_dict()
    ours.load_state_dict({n: weights[RENAMED[n]] for n in ours.state_dict()})
    return ours, theirs


@pytest.fixture
def x():
    return torch.randn(2, TOKENS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_outputs_are_those_of_jetmoe(pair, x):
    ours, theirs = pair
    want = theirs(x)
    assert want.std() > 1
    torch.testing.assert_close(ours(x), want, rtol=1e-5, atol=1e-5)


def test_cached_decoding_is_that_of_jetmoe(pair, x):
    ours, theirs = pair
    with torch.no_grad():
        cache = DynamicCache()
        want = theirs(x[:, :12], cache=cache)
        y, state = ours.prefill(x[:, :12], ours.init_state(2, TOKENS))
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        for t in range(12, TOKENS):
            want = theirs(x[:, t : t + 1], t, cache)
            y, state = ours.step(x[:, t : t + 1], state)
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_jetmoe(pair, x):
    ours, theirs = pair
    for layer in (ours, theirs):
        layer(x).square().mean().backward()
    wanted = {n: p.grad for n, p in theirs.layer.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[RENAMED[name]], rtol=1e-4, atol=1e-5)
