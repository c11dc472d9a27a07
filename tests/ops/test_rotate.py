"""Pairs turned by angles: against the formula, with heads that stand apart in wider tensors, and gradients."""

from __future__ import annotations

import pytest
import torch

from slipstream.ops.rotate import reference, rotate

B, T, H = 2, 5, 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("width", "pairs"), [(2, 1), (64, 32), (70, 35), (80, 20), (7, 0)])
def test_it_is_the_formula_and_so_is_its_gradient(width: int, pairs: int, dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(B, H + 1, T, width + 2, dtype=dtype, generator=draw, requires_grad=True)
    angle = torch.randn(B, T, pairs, dtype=dtype, generator=draw)
    seed = torch.randn(B, T, H, width, dtype=dtype, generator=draw)
    ways = []
    for turn in (rotate, reference):
        y = turn(wide[:, 1:, :, 1:-1].transpose(1, 2), angle.cos(), angle.sin())
        ways.append((y, *torch.autograd.grad((y * seed).sum(), wide)))
    tol = 1e-12 if dtype == torch.float64 else 1e-6
    for got, want in zip(*ways):
        torch.testing.assert_close(got, want, rtol=tol, atol=tol)
    with torch.no_grad():
        x = wide[:, 1:, :, 1:-1].transpose(1, 2)
        torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), ways[0][0], rtol=tol, atol=tol)


def test_no_tokens():
    assert rotate(torch.zeros(B, 0, H, 4), torch.zeros(B, 0, 2), torch.zeros(B, 0, 2)).shape == (B, 0, H, 4)
