"""RWKV-4's weighted mean against its definition: outputs, gradients, cuts, ragged rows, keys that no exponential could hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slipstream.ops.dispatch import torch_forms
from slipstream.ops.wkv_scan import LEAST, Sums, reference, wkv_scan

B, T, D = 3, 40, 19  # no vector divides them


def given(dtype: torch.dtype = torch.float64, size: float = 1.0) -> tuple[list[Tensor], Sums]:
    draw = torch.Generator().manual_seed(0)
    k, v, num, den = (
        torch.randn(*n, dtype=torch.float64, generator=draw) for n in ((B, T, D), (B, T, D), (B, D), (B, D))
    )
    w, u = torch.rand(D, dtype=torch.float64, generator=draw), torch.randn(D, dtype=torch.float64, generator=draw)
    top = torch.randn(B, D, dtype=torch.float64, generator=draw)
    lines = [t.to(dtype) for t in (size * k, v, 3 * w**3 + 1e-4, u)]
    return lines, (num.to(dtype), den.abs().to(dtype), top.to(dtype))


def whole(state: Sums) -> list[Tensor]:
    """The sums themselves."""
    return [t * state[2].exp() for t in state[:2]]


def test_is_its_definition():
    lines, state = given()
    y, final = wkv_scan(*lines, state)
    want, sums = reference(*lines, state)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole(final), list(sums[:2]), rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_the_definition():
    found = []
    for f in (wkv_scan, reference):
        lines, state = given()
        leaves = [t.requires_grad_() for t in (*lines, *state[:2])]
        y, final = f(*leaves[:4], (leaves[4], leaves[5], state[2]))
        found.append(torch.autograd.grad(y.square().sum() + sum(t.square().sum() for t in whole(final)), leaves))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_both_forms_agree_also_where_exponentials_would_not(dtype, size):
    lines, state = given(dtype, size)
    with torch_forms():
        want = wkv_scan(*lines, state)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5 * max(size, 10)  # an exponent has so many digits less
    torch.testing.assert_close(wkv_scan(*lines, state), want, rtol=tolerance, atol=tolerance)


def test_any_cut_and_no_tokens():
    (k, v, w, u), state = given()
    want, last = wkv_scan(k, v, w, u, state)
    ys = []
    for start, end in ((0, 1), (1, 1), (1, 20), (20, T)):
        y, state = wkv_scan(k[:, start:end], v[:, start:end], w, u, state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_rows_end_where_they_end_whatever_the_padding_holds():
    (k, v, w, u), state = given()
    lengths = torch.tensor([T, 0, 7])
    for row, n in enumerate(lengths.tolist()):
        k[row, n:], v[row, n:] = math.nan, math.nan
    y, final = wkv_scan(k, v, w, u, state, lengths)
    for row, n in enumerate(lengths.tolist()):
        one = tuple(t[row : row + 1] for t in state)
        want, alone = wkv_scan(k[row : row + 1, :n], v[row : row + 1, :n], w, u, one)
        torch.testing.assert_close(y[row : row + 1, :n], want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close([t[row : row + 1] for t in whole(final)], whole(alone), rtol=1e-12, atol=1e-12)


def test_from_nothing_the_first_token_reads_itself_and_a_nan_stays_in_its_channel():
    (k, v, w, u), _ = given()
    nothing = (torch.zeros(B, D).double(), torch.zeros(B, D).double(), torch.full((B, D), LEAST).double())
    k[0, 5, 3] = math.nan
    y, _ = wkv_scan(k, v, w, u, nothing)
    torch.testing.assert_close(y[:, 0], v[:, 0])
    assert y[0, 5:, 3].isnan().all() and y.isnan().sum() == T - 5
