"""Slots, levels, memories, chunks and landmarks against outside code with the same weights.

Stored arrays, made by make_slot_attention.py, in float32: they compute in it; transformers' layer for nystromformer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

import slipstream as ss
from slipstream.core.errors import InputError

SETTINGS = {
    "abc": {"n_slots": 5},
    "gated_slot_attention": {"n_slots": 5},
    "log_linear_attention": {"d_state": 6, "n_levels": 6},
    "mixture_of_memories": {"n_memories": 3},
    "gau": {"k_dim": 6, "block_size": 4},
    "linformer": {"max_len": 30, "rank": 4},
    "synthesizer dense": {"kind": "dense", "max_len": 30},
    "synthesizer factorised_dense": {"kind": "factorised_dense", "max_len": 30},
    "synthesizer random": {"kind": "random", "max_len": 30},
    "synthesizer factorised_random": {"kind": "factorised_random", "max_len": 30, "rank": 4},
}
HEADLESS = ("gau",)


def stored(name):
    """Input, results, and the mixer with the stored weights."""
    arrays = np.load(Path(__file__).with_name("slot_attention.npz"))
    found = {n.partition("/")[2]: torch.from_numpy(arrays[n]) for n in arrays if n.startswith(name + "/")}
    x, results = found.pop("x"), {n: found.pop(n) for n in ("y", "K", "V") if n in found}
    heads = {} if name in HEADLESS else {"n_heads": 2}
    mixer = ss.mixer(name.partition(" ")[0], d_model=x.shape[-1], **heads, **SETTINGS[name]).eval()
    mixer.load_state_dict(found)
    return x, results, mixer


@pytest.mark.parametrize("name", SETTINGS)
def test_a_whole_pass_is_theirs(name):
    x, results, mixer = stored(name)
    assert results["y"].std() > 0.1
    torch.testing.assert_close(mixer(x), results["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "linformer"])
def test_prefill_and_steps_are_their_whole_pass(name):
    x, results, mixer = stored(name)
    y, state = mixer.prefill(x[:, :13], mixer.init_state(len(x), x.shape[1]))
    ys = [y]
    for t in range(13, x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), results["y"], rtol=1e-4, atol=1e-5)
    for slot in results.keys() - {"y"}:
        torch.testing.assert_close(state[slot], results[slot], rtol=1e-4, atol=1e-5)


D, H, LANDMARKS = 16, 2, 4


def nystrom_pair(tokens):
    sizes = {"hidden_size": D, "num_attention_heads": H, "num_landmarks": LANDMARKS, "segment_means_seq_len": tokens}
    theirs = NystromformerSelfAttention(NystromformerConfig(**sizes, conv_kernel_size=5)).eval()
    theirs.init_option = "exact"  # the norm of each head and row; "original" takes the largest of the batch
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, 0.0, 0.0 if name.endswith("bias") else 0.3)
    ours = ss.mixer("nystromformer", d_model=D, n_heads=H, n_landmarks=LANDMARKS, conv_size=5).eval()
    renamed = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "conv": "conv"}
    weights = {n: p for n, p in theirs.named_parameters() if n.endswith("weight")}
    ours.load_state_dict(
        {f"{renamed[n.partition('.')[0]]}.weight": p for n, p in weights.items()} | {"o_proj.weight": torch.eye(D)}
    )
    return theirs, ours


@pytest.mark.parametrize("tokens", [4, 20, 32])
def test_nystromformer_is_that_of_transformers(tokens):
    torch.manual_seed(0)
    theirs, ours = nystrom_pair(tokens)
    x = torch.randn(3, tokens, D)
    with torch.no_grad():
        want, got = theirs(x)[0], ours(x)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rebuilt_from_all_but_one_token_attention_is_nearly_right():
    """With a landmark for every token it is computed as it is; with one less, rebuilt."""
    torch.manual_seed(0)
    exact = ss.mixer("nystromformer", d_model=D, n_heads=H, n_landmarks=20).eval()
    rebuilt = ss.mixer("nystromformer", d_model=D, n_heads=H, n_landmarks=19).eval()
    rebuilt.load_state_dict(exact.state_dict())
    x = torch.randn(2, 20, D)
    assert (rebuilt(x) - exact(x)).abs().max() < 0.1 * exact(x).std()


def test_two_levels_of_one_scale_are_mamba2():
    """Every scale is softplus(0) = log 2, of which the norm leaves nothing where the skip and its eps have it too."""
    torch.manual_seed(0)
    ours = ss.mixer("log_linear_attention", d_model=D, n_heads=H, d_state=6, n_levels=2).double()
    mamba2 = ss.mixer("mamba2", d_model=D, n_heads=H, d_state=6).double()
    ours.level_weight.data.zero_()
    weights = {n: p.clone() for n, p in ours.state_dict().items() if n != "level_weight"}
    mamba2.load_state_dict(weights | {"in_proj.weight": weights["in_proj.weight"][: len(mamba2.in_proj.weight)]})
    ours.D.data.mul_(np.log(2))
    ours.norm.eps = mamba2.norm.eps * np.log(2) ** 2
    x = torch.randn(2, 50, D, dtype=torch.float64)
    torch.testing.assert_close(ours(x), mamba2(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "call"), [("synthesizer", "prefill"), ("synthesizer", "forward"), ("linformer", "forward")]
)
def test_beyond_its_tables_an_input_is_refused(name, call):
    mixer = ss.mixer(name, d_model=D, max_len=20)
    x = torch.randn(1, 21, D)
    with pytest.raises(InputError, match=r"20 tokens, not 21; set max_len=21"):
        mixer(x) if call == "forward" else mixer.prefill(x, mixer.init_state(1))


def test_a_router_that_could_not_learn_is_refused():
    with pytest.raises(InputError, match="would not learn"):
        ss.mixer("mixture_of_memories", d_model=D, top_k=1)


def test_a_memory_keeps_what_it_was_where_a_token_does_not_go():
    torch.manual_seed(0)
    mixer = ss.mixer("mixture_of_memories", d_model=D, n_heads=H, n_memories=4, shared=False).eval()
    x = torch.randn(1, 9, D)
    _, before = mixer.prefill(x[:, :8], mixer.init_state(1))
    _, after = mixer.step(x[:, 8:], before.clone())
    chosen = mixer.router(x[:, 8]).topk(2).indices[0].tolist()
    for m in range(4):
        assert torch.equal(before["S"][:, m], after["S"][:, m]) == (m not in chosen)
