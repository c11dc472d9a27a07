"""causal_sinkhorn against its definition: values and gradients, any cut of the rows, padding, extremes."""

from __future__ import annotations

import pytest
import torch

from slipstream.ops.sinkhorn import NOTHING, causal_sinkhorn, reference

B, H, N = 2, 3, 9


def scores(dtype=torch.float64):
    return 2 * torch.randn(B, H, N, N, generator=torch.Generator().manual_seed(0), dtype=dtype)


def past(first, last):
    return (torch.arange(N) < torch.arange(first, last)[:, None]).expand(B, 1, -1, -1)


def nothing(n_iterations):
    return torch.full((B, H, n_iterations, N), NOTHING, dtype=torch.float64)


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("n_iterations", [1, 2, 5])
def test_all_rows_at_once_are_the_definition(n_iterations):
    leaf, other = scores().requires_grad_(), scores().requires_grad_()
    got, _ = causal_sinkhorn(leaf, past(0, N), nothing(n_iterations))
    want = reference(other, n_iterations)
    close(got, want)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    close(*(torch.autograd.grad(o, x, weights)[0] for o, x in ((got, leaf), (want, other))))


def test_rows_in_pieces_are_rows_at_once():
    want, end = causal_sinkhorn(scores(), past(0, N), nothing(3))
    taken, got = nothing(3), []
    for a, b in ((0, 2), (2, 2), (2, 7), (7, 9)):
        rows, taken = causal_sinkhorn(scores()[:, :, a:b], past(a, b), taken)
        got.append(rows)
    close(torch.cat(got, 2), want)
    close(taken, end)


def test_every_row_is_a_mean_and_padding_takes_nothing():
    weights, taken = causal_sinkhorn(scores(), past(0, N), nothing(4))
    close(weights.sum(3)[:, :, 1:], torch.ones(B, H, N - 1, dtype=torch.float64))
    blind = torch.zeros(B, 1, 2, N, dtype=torch.bool)
    rows, same = causal_sinkhorn(1e4 * scores()[:, :, :2], blind, taken)
    assert not rows.any()
    close(same, taken)


def test_a_taken_column_is_worth_less():
    """Rows 2 and 3 score alike; row 2 took column 0, so row 3 turns to the column it has seen nobody take."""
    flat = torch.zeros(B, H, N, N, dtype=torch.float64)
    weights, _ = causal_sinkhorn(flat, past(0, N), nothing(1))
    assert (weights[:, :, 3, 2] > weights[:, :, 3, 0]).all()


def test_extreme_scores_stay_finite():
    leaf = (1e3 * scores(torch.float32).sign()).requires_grad_()
    weights, _ = causal_sinkhorn(leaf, past(0, N), nothing(5).float())
    (grad,) = torch.autograd.grad(weights.square().sum(), leaf)
    assert weights.isfinite().all() and grad.isfinite().all()
