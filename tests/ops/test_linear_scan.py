"""linear_scan against its loop: outputs, final state, every gradient; ragged rows, packed documents, long lines."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from slipstream.ops.linear_scan import linear_scan, reference

B, T, R = 3, 11, (2, 4)


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.fixture(params=[torch.float64, torch.complex128], ids=str)
def arguments(request):
    """Decay of any sign (or phase), inputs and an entering state."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, *R), (B, T, *R), (B, *R)]
    decay, b, state = (torch.randn(s, dtype=request.param, generator=generator) for s in shapes)
    return [v.requires_grad_() for v in (0.7 * decay, b, state)]


def test_it_is_the_loop(arguments):
    for got, want in zip(linear_scan(*arguments), reference(*arguments)):
        close(got, want)


def test_gradients_are_those_of_the_loop(arguments):
    weights = [torch.randn_like(v) for v in reference(*arguments)]

    def gradients(scan):
        return torch.autograd.grad(sum((v * w).abs().sum() for v, w in zip(scan(*arguments), weights)), arguments)

    for got, want in zip(gradients(linear_scan), gradients(reference)):
        close(got, want)


def test_gradients_pass_finite_differences_with_ragged_rows(arguments):
    decay, b, state = arguments
    few = [v.detach().requires_grad_() for v in (decay[:, :4, 0, :2], b[:, :4, 0, :2], state[:, 0, :2])]
    assert torch.autograd.gradcheck(lambda *v: linear_scan(*v, lengths=torch.tensor([0, 4, 2])), few)


def test_padding_reaches_nothing(arguments):
    decay, b, state = (v.detach() for v in arguments)
    lengths = [0, T, 4]
    for row, n in enumerate(lengths):
        decay[row, n:], b[row, n:] = torch.nan, 1e4
    h, final = linear_scan(decay, b, state, torch.tensor(lengths))
    for row, n in enumerate(lengths):
        alone, last = reference(decay[row : row + 1, :n], b[row : row + 1, :n], state[row : row + 1])
        close(h[row : row + 1, :n], alone)
        close(final[row : row + 1], last)


def test_packed_documents_are_as_alone(arguments):
    decay, b = (v.detach().flatten(0, 1)[None] for v in arguments[:2])
    bounds = [0, 5, 5, 18, B * T]
    h, final = linear_scan(decay, b, cu_seqlens=torch.tensor(bounds))
    alone = [linear_scan(decay[:, i:j], b[:, i:j]) for i, j in pairwise(bounds)]
    close(h, torch.cat([y for y, _ in alone], 1))
    close(final, torch.cat([s for _, s in alone]))


def test_no_tokens_leave_the_state(arguments):
    decay, b, state = arguments
    h, final = linear_scan(decay[:, :0], b[:, :0], state)
    assert h.shape == (B, 0, *R)
    assert torch.equal(final, state)


def test_the_inputs_are_left_alone_and_the_state_holds_no_sequence():
    decay, b, state = torch.rand(1, 50, 8), torch.randn(1, 50, 8), torch.randn(1, 8)
    copies = [v.clone() for v in (decay, b, state)]
    _, final = linear_scan(decay, b, state)
    assert all(torch.equal(v, c) for v, c in zip((decay, b, state), copies))
    assert final.untyped_storage().nbytes() == final.nbytes


def test_low_precision_keeps_a_wide_state():
    decay, b = torch.rand(2, 300, 4).bfloat16(), torch.randn(2, 300, 4).bfloat16()
    h, final = linear_scan(decay, b)
    want, last = reference(decay.double(), b.double(), torch.zeros(2, 4, dtype=torch.float64))
    assert (h.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    close(final.double(), last, 1e-5)
    close(h.double(), want, 1e-2)


def test_it_holds_over_many_tokens():
    decay = torch.full((1, 16384, 2), 0.9999, requires_grad=True)
    h, final = linear_scan(decay, torch.full((1, 16384, 2), 50.0))
    close(final[0, 0].item(), 50 * (1 - 0.9999**16384) / (1 - 0.9999), 1e-3)
    h.sum().backward()
    assert decay.grad.isfinite().all()
