"""Hashed, clustered, sorted and remembered attention against others' code and against the papers' equations, same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import slipstream as ss

STORED = {n: torch.from_numpy(a) for n, a in np.load(Path(__file__).with_name("bucket_attention.npz")).items()}
SETTINGS = {
    "reformer": {"n_heads": 2, "n_hashes": 3, "n_buckets": 6, "window": 24, "rope_base": None},
    "routing_transformer": {"n_heads": 2, "n_clusters": 3, "window": 5},
    "sinkhorn": {"n_heads": 2, "block_size": 4, "n_iterations": 3},
    "memorizing_transformer": {"n_heads": 2, "window": 5, "top_k": 3},
}
TOLERANCE = {"reformer": 1e-6}  # theirs adds 1e-9 to the counts of pairs, ours 1e-6 to squared lengths
every_mixer = pytest.mark.parametrize("name", SETTINGS)


def pair(name):
    stored = {n.removeprefix(name + "/"): t for n, t in STORED.items() if n.startswith(name + "/")}
    y = stored.pop("y")
    assert y.std() > 0.1
    mixer = ss.mixer(name, d_model=16, **SETTINGS[name]).double().eval()
    mixer.load_state_dict(stored)
    return mixer, y


def close(a, b, tol):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@every_mixer
def test_a_whole_pass_is_theirs(name):
    mixer, y = pair(name)
    close(mixer(STORED["x"]), y, TOLERANCE.get(name, 1e-9))


@every_mixer
def test_prefill_and_steps_are_theirs(name):
    mixer, y = pair(name)
    x, state = STORED["x"], mixer.init_state(2, 24)
    with torch.no_grad():
        first, state = mixer.prefill(x[:, :13], state)
        ys = [first]
        for t in range(13, x.shape[1]):
            one, state = mixer.step(x[:, t : t + 1], state)
            ys.append(one)
    close(torch.cat(ys, 1), y, TOLERANCE.get(name, 1e-9))


def hf_layer(chunk_length, n_buckets=6, n_hashes=3):
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        hidden_size=16, num_attention_heads=2, attention_head_size=8, is_decoder=True, hash_seed=0, num_hashes=n_hashes,
        num_buckets=n_buckets, lsh_attn_chunk_length=chunk_length, lsh_attention_probs_dropout_prob=0.0,
        lsh_num_chunks_before=1, lsh_num_chunks_after=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LSHSelfAttention(config, layer_idx=0).eval()
    ours = ss.mixer(
        "reformer", d_model=16, n_heads=2, n_hashes=n_hashes, n_buckets=n_buckets, window=24, rope_base=None
    )
    ours.qk_proj.load_state_dict(theirs.query_key.state_dict())
    ours.v_proj.load_state_dict(theirs.value.state_dict())
    torch.nn.init.eye_(ours.o_proj.weight)
    return theirs, ours.eval()


def test_one_chunk_of_all_tokens_is_transformers_reformer():
    """Where their chunk holds the sequence they do not hash: all of ours are in one bucket."""
    theirs, ours = hf_layer(chunk_length=24)
    ours.rotations.zero_()
    x = STORED["x"].float()
    with torch.no_grad():
        close(ours(x), theirs(x, use_cache=False).hidden_states, 1e-5)


def test_buckets_are_transformers_buckets():
    """Same rotations, same rounds: theirs number the buckets of all rounds through."""
    theirs, ours = hf_layer(chunk_length=6)
    torch.manual_seed(0)
    ours.rotations.copy_(torch.randn(ours.rotations.shape))
    x = STORED["x"].float()
    with torch.no_grad():
        numbers = theirs(x, use_cache=False).buckets  # B H R T
        *_, bucket = ours._hashed(x, torch.zeros(2, dtype=torch.long))
    assert torch.equal(bucket.permute(0, 2, 3, 1), numbers - 6 * torch.arange(3)[:, None])
