"""Static sparse patterns against their papers in numpy (sparse_patterns.npz, float64), and against transformers' encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdConfig, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

import slipstream as ss

SETTINGS = {
    "sparse_transformer strided": {"pattern": "strided", "stride": 6},
    "sparse_transformer fixed": {"pattern": "fixed", "stride": 6, "summary": 2},
    "longnet": {"segments": (4, 12, 24), "rates": (1, 2, 4)},
    "transformer_xl": {"segment": 7, "n_memory": 1},
}


def stored(name):
    """Input, output, and the mixer with the stored weights."""
    arrays = np.load(Path(__file__).with_name("sparse_patterns.npz"))
    found = {n.partition("/")[2]: torch.from_numpy(arrays[n]) for n in arrays if n.startswith(name + "/")}
    x, y = found.pop("x"), found.pop("y")
    mixer = ss.mixer(name.partition(" ")[0], d_model=x.shape[-1], n_heads=2, **SETTINGS[name]).double()
    mixer.load_state_dict(found)
    return x, y, mixer


@pytest.mark.parametrize("name", SETTINGS)
def test_a_whole_pass_is_the_papers(name):
    x, y, mixer = stored(name)
    assert y.std() > 0.1
    torch.testing.assert_close(mixer(x), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_prefill_and_steps_are_the_papers_whole_pass(name):
    x, want, mixer = stored(name)
    y, state = mixer.prefill(x[:, :17], mixer.init_state(len(x), x.shape[1]))
    ys = [y]
    for t in range(17, x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), want, rtol=1e-10, atol=1e-10)


def randomised(theirs):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.2 * torch.randn_like(p))
    return theirs.double().eval()


def take_weights(mixer, theirs):
    with torch.no_grad():
        for ours, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            getattr(mixer.qkv, ours).load_state_dict(getattr(theirs, name).state_dict())
            if getattr(mixer, "qkv_global", None) is not None:
                getattr(mixer.qkv_global, ours).load_state_dict(getattr(theirs, name + "_global").state_dict())
        mixer.o_proj.weight.copy_(torch.eye(mixer.config.d_model))


@pytest.mark.parametrize("n_global", [0, 3])
def test_longformer_is_theirs(n_global):
    """They take the softmax in float32."""
    settings = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "attention_window": [8]}
    theirs = randomised(LongformerSelfAttention(LongformerConfig(**settings, attention_probs_dropout_prob=0.0), 0))
    mixer = ss.mixer(
        "longformer", d_model=32, n_heads=4, rope_base=None, qkv_bias=True, window=8, n_global=n_global, causal=False
    ).double()
    take_weights(mixer, theirs)
    x = torch.randn(2, 48, 32, dtype=torch.float64)
    mask = torch.zeros(2, 48, dtype=torch.float64)
    mask[:, :n_global] = 10000.0
    with torch.no_grad():
        want = theirs(
            x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=n_global > 0
        )[0]
    assert want.std() > 0.1
    torch.testing.assert_close(mixer(x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixer.reference(x), mixer(x), rtol=1e-10, atol=1e-10)


def test_bigbird_is_theirs_with_the_same_blocks_drawn(monkeypatch):
    """Their draw is by numpy's global generator, and off in evaluation: they are given ours."""
    block, blocks, n_random = 4, 14, 2
    config = BigBirdConfig(
        hidden_size=32,
        num_attention_heads=4,
        block_size=block,
        num_random_blocks=n_random,
        max_position_embeddings=4096,
        attention_probs_dropout_prob=0.0,
    )
    theirs = randomised(BigBirdBlockSparseAttention(config))
    mixer = ss.mixer(
        "bigbird",
        d_model=32,
        n_heads=4,
        rope_base=None,
        qkv_bias=True,
        block=block,
        n_random=n_random,
        seed=3,
        causal=False,
    ).double()
    take_weights(mixer, theirs)
    inner = torch.arange(1, blocks - 1)
    plan = [index_set.members[-1].drawn(inner).numpy() for index_set in mixer.index_sets(blocks)]
    assert all((rows >= 1).all() and (rows < blocks - 1).all() for rows in plan)
    monkeypatch.setattr(theirs, "_bigbird_block_rand_mask_with_head", lambda **_: plan)
    x = torch.randn(2, block * blocks, 32, dtype=torch.float64)
    masks = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, block * blocks, dtype=torch.float64), block)
    blocked, band, from_mask, to_mask = masks
    with torch.no_grad():
        want = theirs(x, band, from_mask, to_mask, blocked, blocked)[0]
    assert want.std() > 0.1
    torch.testing.assert_close(mixer(x), want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(mixer.reference(x), mixer(x), rtol=1e-10, atol=1e-10)
