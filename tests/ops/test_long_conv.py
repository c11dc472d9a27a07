"""long_conv against its definition: outputs and gradients, whole, at the end of a history, and for one token."""

from __future__ import annotations

import pytest
import torch

from slipstream.ops.long_conv import long_conv, long_conv_step, reference, transform_size

B, S, D = 3, 23, 4


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def draw(length=S):
    generator = torch.Generator().manual_seed(0)
    u, taps = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((B, length, D), (length, D)))
    return u.requires_grad_(), taps.requires_grad_()


@pytest.mark.parametrize("length", [1, 2, 16, S])
def test_it_is_the_definition_with_all_gradients(length):
    u, taps = draw(length)
    got, want = long_conv(u, taps), reference(u, taps)
    close(got, want)
    weights = torch.randn_like(want)
    for g, w in zip(*(torch.autograd.grad((y * weights).sum(), (u, taps)) for y in (got, want))):
        close(g, w)


def test_rows_go_on_from_their_own_past():
    u, taps = draw()
    past, want = torch.tensor([0, 5, S - 4]), reference(u, taps)
    got = long_conv(u, taps, past, 4)
    for row, p in enumerate(past.tolist()):
        close(got[row], want[row, p : p + 4])


def test_one_token_is_the_definition_with_all_gradients():
    u, taps = draw()
    position, want = torch.tensor([0, 9, S - 1]), reference(u, taps)
    got = long_conv_step(u, taps, position)
    want = want[torch.arange(B), position]
    close(got, want)
    for g, w in zip(*(torch.autograd.grad(y.square().sum(), (u, taps)) for y in (got, want))):
        close(g, w)


def test_no_tokens():
    u, taps = draw(0)
    assert long_conv(u, taps).shape == (B, 0, D)
    u, taps = draw()
    assert long_conv(u, taps, torch.tensor([3, 0, S]), 0).shape == (B, 0, D)


def test_float32_is_near_over_many_tokens_and_bfloat16_is_computed_in_it():
    u, taps = (v.detach() for v in draw(16384))
    want = long_conv(u, taps)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        y = long_conv(u.to(dtype), taps.to(dtype))
        assert y.dtype == dtype
        assert (y.double() - want).abs().max() < tolerance * want.abs().max()


def test_the_transform_holds_twice_the_line():
    for length in range(1, 70):
        assert 2 * length - 1 <= transform_size(length) < 4 * length
