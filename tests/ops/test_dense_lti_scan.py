"""dense_lti_scan against its loop: outputs, final state and all gradients, any chunk, any entering state, ragged rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.dense_lti_scan import dense_lti_flops, dense_lti_scan, reference

B, T, D, N = 3, 23, 4, 5


def close(a, b, tol=1e-11):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def draw(tokens=T):
    """x, A, B, C, state; A a contraction, not symmetric, with no orthogonal eigenvectors."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, tokens, D), (D, N, N), (D, N), (D, N), (B, D, N)]
    x, A, b, c, state = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return [v.requires_grad_() for v in (x, 0.98 * A / torch.linalg.matrix_norm(A, 2)[:, None, None], b, c, state)]


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 16, 64])
def test_it_is_the_loop_with_all_gradients(chunk_size):
    arguments = draw()
    got, want = dense_lti_scan(*arguments, chunk_size=chunk_size), reference(*arguments)
    weights = [torch.randn_like(v) for v in want]
    for g, w in zip(got, want):
        close(g, w)
    gradients = [
        torch.autograd.grad(sum((v * w).sum() for v, w in zip(out, weights)), arguments) for out in (got, want)
    ]
    for g, w in zip(*gradients):
        close(g, w, 1e-10)


@pytest.mark.parametrize("lengths", [[0, T, 4], [8, 7, 1], [16, 20, 22]], ids=str)
def test_padding_reaches_nothing(lengths):
    x, *system, state = (v.detach() for v in draw())
    for row, n in enumerate(lengths):
        x[row, n:] = torch.nan
    y, final = dense_lti_scan(x, *system, state, torch.tensor(lengths), chunk_size=4)
    for row, n in enumerate(lengths):
        alone, last = reference(x[row : row + 1, :n], *system, state[row : row + 1])
        close(y[row : row + 1, :n], alone)
        close(final[row : row + 1], last)


def test_no_tokens_leave_the_state():
    *inputs, state = draw(0)
    y, final = dense_lti_scan(*inputs, state)
    assert y.shape == (B, 0, D)
    assert torch.equal(final, state)


def test_float32_stays_exact_over_many_tokens():
    """The powers of a contraction do not grow, so squaring them loses nothing."""
    _, A, b, c, _ = (v.detach() for v in draw())
    A = A / 0.98 * (1 - 1e-5)
    x = torch.randn(1, 16384, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, _ = dense_lti_scan(x.float(), A.float(), b.float(), c.float())
    want, _ = dense_lti_scan(x, A, b, c)
    assert (y.double() - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize(("tokens", "chunk_size"), [(23, 8), (64, 64), (5, 64), (64, 4), (1, 8)])
def test_flops_are_those_torch_counts(tokens, chunk_size):
    with FlopCounterMode(display=False) as counter:
        dense_lti_scan(*draw(tokens), chunk_size=chunk_size)
    assert counter.get_total_flops() == dense_lti_flops(tokens, B, D, N, chunk_size)
