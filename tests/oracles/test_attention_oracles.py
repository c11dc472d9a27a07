"""Whole models against transformers' classes with copied weights: Llama (grouped heads, rope), Mistral (window), SwiGLU."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import slipstream as ss

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "max_position_embeddings": 256,
}
MODELS = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rope_theta=10000.0),
        "attention(n_heads=6, n_kv_heads=2)/swiglu(d_ff=40)",
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig(**SIZES, sliding_window=7, head_dim=8),
        "sliding_window(n_heads=6, n_kv_heads=2, window=7)/swiglu(d_ff=40)",
    ),
}


def renamed(name: str) -> str:
    """Their weight name for ours."""
    rules = [
        ("embedding.weight", "model.embed_tokens.weight"),
        ("head.proj", "lm_head"),
        ("stack.norm", "model.norm"),
        ("stack.blocks.", "model.layers."),
        (".norms.0.", ".input_layernorm."),
        (".norms.1.", ".post_attention_layernorm."),
        (".mixers.0.qkv.", ".self_attn."),
        (".mixers.0.", ".self_attn."),
        (".mixers.1.", ".mlp."),
    ]
    for ours, theirs in rules:
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(params=MODELS)
def pair(request):
    cls, config, pattern = MODELS[request.param]
    torch.manual_seed(0)
    theirs = cls(config).eval().double()
    ours = ss.language_model(pattern, n_layers=3, d_model=48, vocab_size=61, tie_embeddings=False).eval().double()
    weights = theirs.state_dict()
    ours.load_state_dict({n: weights[renamed(n)] for n in ours.state_dict()})
    return ours, theirs


@pytest.fixture
def tokens():
    return torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))


def test_logits_are_theirs(pair, tokens):
    ours, theirs = pair
    want = theirs(tokens).logits
    assert want.std() > 0.5  # the mechanism matters
    torch.testing.assert_close(ours(tokens), want, rtol=1e-5, atol=1e-5)


def test_cached_decoding_is_theirs(pair, tokens):
    ours, theirs = pair
    with torch.no_grad():
        past = theirs(tokens[:, :20], use_cache=True)
        logits, state = ours.prefill(tokens[:, :20])
        torch.testing.assert_close(logits[:, 0], past.logits[:, -1], rtol=1e-5, atol=1e-5)
        state = ours.reserve(state, 20)
        for t in range(20, 40):
            past = theirs(tokens[:, t : t + 1], past_key_values=past.past_key_values, use_cache=True)
            logits, state = ours.step(tokens[:, t : t + 1], state)
            torch.testing.assert_close(logits, past.logits, rtol=1e-5, atol=1e-5)


def test_gradients_are_theirs(pair, tokens):
    ours, theirs = pair
    for logits in (ours(tokens), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, grads[renamed(name)], rtol=1e-4, atol=1e-5)
