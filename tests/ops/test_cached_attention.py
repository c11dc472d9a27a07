"""Attention of one token over the filled part of a cache, against its definition: rows of other lengths, shared heads, layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slipstream.ops.cached_attention import cached_attention, reference
from slipstream.ops.softmax import PLAIN, Softmax

B, H, S, K, V = 3, 8, 150, 21, 13  # no tile and no vector divides them
SETTINGS = {
    "plain": PLAIN,
    "scaled and capped": Softmax(0.7, cap=1.5),
    "sinks": Softmax(sinks=torch.linspace(-2, 2, H, dtype=torch.float64)),
}


def given(G: int, dtype: torch.dtype = torch.float64, ends: tuple[int, ...] = (150, 1, 67)) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    shapes = (B, 1, H, K), (B, S, G, K), (B, S, G, V)
    q, k, v = (torch.randn(*dims, dtype=torch.float64, generator=draw).to(dtype) for dims in shapes)
    return q, k, v, torch.tensor(ends)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("G", [8, 2, 1])
def test_is_its_definition(G, name):
    with torch.no_grad():
        o = cached_attention(*given(G), SETTINGS[name])
    torch.testing.assert_close(o, reference(*given(G), SETTINGS[name]), rtol=0, atol=1e-12)


def test_what_is_not_filled_is_not_read():
    q, k, v, ends = given(2)
    expected = cached_attention(q, k, v, ends)
    for b, end in enumerate(ends.tolist()):
        k[b, end:], v[b, end:] = 1e4, 1e4
    with torch.no_grad():
        torch.testing.assert_close(cached_attention(q, k, v, ends), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_without_keys_reads_zero(sinks):
    q, k, v, ends = given(2, ends=(0, 5, 0))
    with torch.no_grad():
        o = cached_attention(q, k, v, ends, Softmax(sinks=torch.zeros(H, dtype=torch.float64)) if sinks else PLAIN)
    assert not o[[0, 2]].any()
    assert o[1].any()


def test_any_layout_of_the_cache():
    q, k, v, ends = given(2)
    expected = cached_attention(q, k, v, ends)
    kv = (
        torch.cat([k, v], -1).transpose(1, 2).contiguous().transpose(1, 2)
    )  # heads outside, keys and values side by side
    with torch.no_grad():
        o = cached_attention(q, kv[..., :K], kv[..., K:], ends)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)


def test_large_logits_and_nan():
    q, k, v, ends = given(8, torch.float32)
    with torch.no_grad():
        o = cached_attention(q * 1e4, k * 1e4, v, ends)
        assert o.isfinite().all()
        k[0, 3, 0] = torch.nan
        o = cached_attention(q, k, v, ends)
    assert o[0, 0, 0].isnan().all()
    assert o[0, 0, 1:].isfinite().all()
    assert o[1:].isfinite().all()


def test_gradients_are_those_of_attention():
    q, k, v, ends = (t.requires_grad_() if t.is_floating_point() else t for t in given(2))
    weight = torch.randn(B, 1, H, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((cached_attention(q, k, v, ends) * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((reference(q, k, v, ends) * weight).sum(), (q, k, v))
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_sinks_alone_may_learn():
    q, k, v, ends = given(2)
    sinks = torch.zeros(H, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(cached_attention(q, k, v, ends, Softmax(sinks=sinks)).sum(), sinks)
    (expected,) = torch.autograd.grad(reference(q, k, v, ends, Softmax(sinks=sinks)).sum(), sinks)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
