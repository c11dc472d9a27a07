"""SeerAttention, when its gate may choose everything, is attention; and a threshold means the same at any cut."""

from __future__ import annotations

import pytest
import torch

import slipstream as ss
from slipstream.core.errors import InputError

B, T, D = 2, 33, 16
HEADS = {"d_model": D, "n_heads": 4, "n_kv_heads": 2, "conv_size": 3}


def seeded(name: str, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = ss.mixer(name, **HEADS, **config).double()
        for p in mixer.parameters():
            p.data.add_(0.2 * torch.randn_like(p))
    return mixer


def line(tokens: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("setting", [{}, {"qk_norm": True, "rope_fraction": 0.5}, {"rope_base": None}])
def test_over_all_blocks_it_is_attention_and_so_are_gradients(setting):
    ours, full = seeded("seer_attention", block_size=4, top_k=9, **setting), seeded("attention", **setting)
    found = dict(ours.named_parameters())
    full.load_state_dict({n: found[n].detach() for n in full.state_dict()})
    x = line().requires_grad_()
    names = [n for n, _ in full.named_parameters()]
    got, want = (m(x) for m in (ours, full))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    theirs = dict(full.named_parameters())
    for a, b in zip(
        torch.autograd.grad((got * line(seed=2)).sum(), [x, *(found[n] for n in names)]),
        torch.autograd.grad((want * line(seed=2)).sum(), [x, *(theirs[n] for n in names)]),
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("threshold", [0.15, 0.3])
def test_a_threshold_means_the_same_at_any_cut(threshold):
    mixer, x = seeded("seer_attention", block_size=4, top_k=5, threshold=threshold), line()
    want = mixer.reference(x)
    assert (want - seeded("seer_attention", block_size=4, top_k=5).reference(x)).abs().max() > 1e-3
    for cut in (1, 4, 7, T):
        state, ys = mixer.init_state(B), []
        for piece in x.split(cut, 1):
            y, state = mixer.prefill(piece, state)
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys, 1), want, rtol=1e-10, atol=1e-10)


def test_a_later_token_of_a_block_does_not_change_what_an_earlier_one_reads():
    mixer, x = seeded("seer_attention", block_size=8, top_k=2), line()
    other = x.clone()
    other[:, 20:] = line(seed=3)[:, 20:]
    torch.testing.assert_close(mixer(x)[:, :20], mixer(other)[:, :20], rtol=1e-12, atol=1e-12)


def test_the_gate_begins_as_the_mean_of_queries_with_the_mean_of_keys():
    """Without positions, and one query head to a key head, it chooses as MoBA does."""
    setting = {"d_model": D, "n_heads": 4, "rope_base": None, "block_size": 4, "top_k": 3}
    ours, moba = ss.mixer("seer_attention", **setting).double(), ss.mixer("moba", **setting).double()
    found = ours.state_dict()
    moba.load_state_dict({n: found[n] for n in moba.state_dict()})
    torch.testing.assert_close(ours(line()), moba(line()), rtol=1e-10, atol=1e-10)


def test_mistakes_are_told():
    with pytest.raises(InputError, match="head_dim 5"):
        ss.mixer("seer_attention", d_model=10, n_heads=2)
    with pytest.raises(InputError, match="threshold"):
        ss.mixer("seer_attention", d_model=16, threshold=1.0)
