"""Layers that choose what they read against outside code with the same weights (stored by make_chosen_attention.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV32Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4RotaryEmbedding
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32RotaryEmbedding

import slipstream as ss

SETTINGS = {
    "moba": {"block_size": 6, "top_k": 3},
    "nsa": {"compress_size": 4, "compress_stride": 4, "block_size": 4, "top_k": 5, "window": 6},
    "nsa strided": {"compress_size": 6, "compress_stride": 2, "block_size": 8, "top_k": 4, "window": 6},
    "dsa": {
        "q_rank": 12, "kv_rank": 10, "nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 5,
        "top_k": 9, "index_n_heads": 16, "index_head_dim": 8,
    },
}  # fmt: skip


def stored(name):
    """Input, output, and the mixer with the stored weights."""
    arrays = np.load(Path(__file__).with_name("chosen_attention.npz"))
    found = {n.partition("/")[2]: torch.from_numpy(arrays[n]) for n in arrays if n.startswith(name + "/")}
    x, y = found.pop("x"), found.pop("y")
    groups = {} if name == "dsa" else {"n_kv_heads": 2}
    mixer = ss.mixer(name.partition(" ")[0], d_model=x.shape[-1], n_heads=4, **groups, **SETTINGS[name]).eval()
    prefix = "qkv." if name == "moba" else ""
    mixer.load_state_dict({n if n == "o_proj.weight" else prefix + n: w for n, w in found.items()})
    return x, y, mixer


def read_on(mixer, x, first):
    """Outputs of a prefill of the first tokens and of steps after it."""
    y, state = mixer.prefill(x[:, :first], mixer.init_state(len(x), x.shape[1]))
    ys = [y]
    for t in range(first, x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    return torch.cat(ys, 1)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_whole_pass_is_theirs(name):
    x, y, mixer = stored(name)
    assert y.std() > 0.1
    torch.testing.assert_close(mixer(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_prefill_and_steps_are_their_whole_pass(name):
    x, want, mixer = stored(name)
    torch.testing.assert_close(read_on(mixer, x, 13), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_chosen_matters(name):
    x, y, mixer = stored(name)
    wider = ss.mixer(mixer.name, **mixer.config.model_dump() | {"top_k": 45})
    wider.load_state_dict(mixer.state_dict())
    assert (wider(x) - y).abs().max() > 0.05


DEEPSEEK = {"n_heads": 4, "q_rank": 12, "kv_rank": 10, "nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 5}
INDEX = {"top_k": 9, "index_n_heads": 16, "index_head_dim": 8}


def deepseek_pair():
    """Their layer of DeepSeek-V3.2 and ours with its weights: turned pairs are neighbours there, half a key apart here."""
    sizes = {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
    }
    sizes |= {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "num_hidden_layers": 1}
    index = {"index_topk": 9, "index_n_heads": 16, "index_head_dim": 8}
    config = DeepseekV32Config(**sizes, **index, attn_implementation="eager")
    theirs = DeepseekV32Attention(config, 0).eval()
    for n, p in theirs.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm.weight" in n else 0.0, 0.4)
    ours = ss.mixer("dsa", d_model=24, **DEEPSEEK, **INDEX).eval()
    weights = {n if n.startswith("indexer") else f"latent.{n}": w.clone() for n, w in theirs.state_dict().items()}
    q, shared = weights["latent.q_b_proj.weight"].unflatten(0, (4, -1)), weights["latent.kv_a_proj_with_mqa.weight"]
    q.copy_(q[:, apart(10)])
    shared.copy_(shared[apart(14)])
    ours.load_state_dict(weights)
    return theirs, DeepseekV32RotaryEmbedding(config), ours


def test_dsa_is_that_of_transformers():
    torch.manual_seed(0)
    theirs, rotary, ours = deepseek_pair()
    x = torch.randn(2, 40, 24)
    causal = torch.full((40, 40), torch.finfo(x.dtype).min).triu(1).expand(2, 1, -1, -1)
    with torch.no_grad():
        want = theirs(x, rotary(x, torch.arange(40)[None]), causal)[0]
        assert want.std() > 0.1
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read_on(ours, x, 17), want, rtol=1e-4, atol=1e-4)


COMPRESSED = {"hca": ("heavily_compressed_attention", 5), "csa": ("compressed_sparse_attention", 2)}


def compressed_pair(name):
    """Their layer of DeepSeek-V4 and ours with its weights. Every head's channels are in our order, and so all that makes
    them; o_proj is the product of their two.
    """
    kind, rate = COMPRESSED[name]
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "head_dim": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4}
    sizes |= {"sliding_window": 6, "o_groups": 3, "o_lora_rank": 7, "num_hidden_layers": 1, "layer_types": [kind]}
    index = {"index_topk": 4, "index_n_heads": 16, "index_head_dim": 6}
    config = DeepseekV4Config(**sizes, **index, compress_rates={kind: rate}, attn_implementation="eager")
    theirs = DeepseekV4Attention(config, 0).eval()
    for n, p in theirs.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm.weight" in n else 0.0, 0.4)
    own = {"rate": rate} | ({"top_k": 4, "index_n_heads": 16, "index_head_dim": 6} if name == "csa" else {})
    base = config.rope_parameters["compress"]["rope_theta"]
    ours = ss.mixer(name, d_model=24, n_heads=3, q_rank=12, rope_head_dim=4, rope_base=base, window=6, **own).eval()
    ours.load_state_dict(dict(renamed(theirs.state_dict())))
    return theirs, DeepseekV4RotaryEmbedding(config), ours


def renamed(weights):
    a, b = weights.pop("o_a_proj.weight").unflatten(0, (3, -1)), weights.pop("o_b_proj.weight").unflatten(1, (3, -1))
    yield "heads.o_proj.weight", torch.einsum("dgr,grk->dgk", b, a).unflatten(2, (-1, 8))[..., apart(8)].flatten(1)
    for n, w in weights.items():
        index = ".indexer." in n
        if n.endswith(("kv_proj.weight", "gate_proj.weight", "q_b_proj.weight", "kv_norm.weight")):
            width = 6 if index else 8
            w = w.unflatten(0, (-1, width))[:, apart(width)].flatten(0, 1)
        elif n.endswith("position_bias"):
            width = 6 if index else 8
            w = w.unflatten(1, (-1, width))[:, :, apart(width)].flatten(1)
        if index:
            part = n.partition(".indexer.")[2].replace("scorer.", "")
            yield f"indexer.{'' if part.startswith(('q_b', 'weights')) else 'compressor.'}{part}", w
        else:
            yield n if n.startswith("compressor") else f"heads.{n}", w


def apart(width):
    """Channels of a head, the four last of which are two neighbouring pairs."""
    return [*range(width - 4), *(width - 4 + i for i in (0, 2, 1, 3))]


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_attention_is_that_of_transformers(name):
    torch.manual_seed(0)
    theirs, rotary, ours = compressed_pair(name)
    x, at = torch.randn(2, 40, 24), torch.arange(40)[None].expand(2, -1)
    near = torch.ones(40, 40, dtype=torch.bool).tril().triu(-5)
    mask = torch.zeros(40, 40).masked_fill(~near, torch.finfo(x.dtype).min).expand(2, 1, -1, -1)
    with torch.no_grad():
        want = theirs(x, {"compress": rotary(x, at, layer_type="compress")}, at, mask)[0]
        assert want.std() > 0.1
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read_on(ours, x, 17), want, rtol=1e-4, atol=1e-4)
