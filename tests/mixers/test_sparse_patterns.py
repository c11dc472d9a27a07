"""Static patterns: where all is seen, they are full attention; what they remember, and what they refuse."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import slipstream as ss
from slipstream.core.errors import InputError

D, T = 16, 37
WHOLE = {
    "block_local": {"block": 64},
    "longformer": {"window": T, "n_global": 0},
    "longformer dilated": {"window": T, "dilation": 1, "n_dilated": 1, "n_global": 0},
    "bigbird window": {"block": 4, "n_window": 10, "n_random": 0},
    "bigbird global": {"block": 4, "n_global": 10, "n_random": 0},
    "bigbird random": {"block": 2, "n_window": 1, "n_global": 0, "n_random": 19},
    "sparse_transformer strided": {"pattern": "strided", "stride": 1},
    "sparse_transformer window": {"pattern": "strided", "stride": T},
    "sparse_transformer fixed": {"pattern": "fixed", "stride": 6, "summary": 6},
    "longnet": {"segments": (64,), "rates": (1,)},
}


def pair(name: str, full: str = "attention", **more):
    """The mixer where it sees all, full attention with the same weights, and an input."""
    torch.manual_seed(0)
    mixer = ss.mixer(name.partition(" ")[0], d_model=D, n_heads=4, n_kv_heads=2, **WHOLE[name], **more).double()
    attention = ss.mixer(full, d_model=D, n_heads=4, n_kv_heads=2).double()
    attention.load_state_dict(mixer.state_dict())
    return mixer, attention, torch.randn(2, T, D, dtype=torch.float64)


def with_gradients(mixer, x):
    leaf = x.clone().requires_grad_()
    mixer.zero_grad()
    y = mixer(leaf)
    y.square().sum().backward()
    return [y, leaf.grad, *(p.grad for p in mixer.parameters())]


@pytest.mark.parametrize("name", WHOLE)
def test_where_all_is_seen_it_is_full_attention(name):
    mixer, attention, x = pair(name)
    for got, want in zip(with_gradients(mixer, x), with_gradients(attention, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_transformer_xl_of_one_segment_without_its_position_terms_is_full_attention():
    mixer = ss.mixer("transformer_xl", d_model=D, n_heads=4, segment=64).double()
    with torch.no_grad():
        for p in (mixer.u, mixer.b, mixer.r_proj):
            p.zero_()
    attention = ss.mixer("attention", d_model=D, n_heads=4, rope_base=None).double()
    attention.qkv.load_state_dict({n: w for n, w in mixer.state_dict().items() if n[:2] in ("q_", "k_", "v_")})
    attention.o_proj.load_state_dict(mixer.o_proj.state_dict())
    x = torch.randn(2, T, D, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), attention(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["bigbird window", "longformer"])
def test_both_sides_seen_whole_are_full_attention_of_both_sides(name):
    mixer, _, x = pair(name)
    changes = {"causal": False} | ({"n_window": 21} if "bigbird" in name else {"window": 2 * T})
    both = type(mixer)(mixer.config.model_copy(update=changes)).double()
    both.load_state_dict(mixer.state_dict())
    attention = ss.mixer("attention", d_model=D, n_heads=4, n_kv_heads=2, causal=False).double()
    attention.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(both(x), attention(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["bigbird", "longformer"])
def test_the_form_that_sees_both_sides_is_its_reference_packed_and_alone(name):
    cls = ss.mixers()[name]
    mixer = cls(cls.tiny.model_copy(update={"causal": False})).double()
    row = torch.randn(1, 60, D, dtype=torch.float64)
    bounds = [0, 1, 24, 30, 60]
    alone = [mixer.reference(row[:, a:b]) for a, b in pairwise(bounds)]
    torch.testing.assert_close(mixer(row, torch.tensor(bounds)), torch.cat(alone, 1), rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match="causal true"):
        mixer.prefill(row, mixer.init_state(1))


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("block_local", 127), ("longformer", 127 + 2), ("longnet", 3 * 127), ("transformer_xl", 255)],
)
def test_a_bounded_pattern_remembers_what_it_can_still_see(name, tokens):
    """Keys and values of so many tokens (longformer: of two kinds for the first)."""
    mixer = ss.mixer(name, d_model=64, n_heads=4)
    assert mixer.state_bytes(10**6) == 2 * tokens * 64 * 4


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("sparse_transformer", {"stride": 4, "summary": 5}, "at most stride 4"),
        ("longformer", {"n_dilated": 9}, "n_dilated 9"),
        ("longnet", {"segments": (8, 12), "rates": (1, 5)}, "rate 5 does not divide segment 12"),
        ("longnet", {"segments": (8, 12), "rates": (1,)}, "as many"),
        ("bigbird", {"n_window": 4, "causal": False}, "n_window 4 must be odd"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_words(name, settings, said):
    with pytest.raises(InputError, match=said):
        ss.mixer(name, d_model=64, n_heads=4, **settings)


def test_key_heads_and_seeds_draw_other_blocks():
    mixers = [ss.mixer("bigbird", d_model=64, n_heads=4, seed=seed) for seed in (0, 1)]
    drawn = [s.members[-1].drawn(torch.arange(50, 60)) for mixer in mixers for s in mixer.index_sets()]
    assert len({tuple(d.flatten().tolist()) for d in drawn}) == len(drawn) == 8
