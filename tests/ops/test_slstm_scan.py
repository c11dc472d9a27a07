"""The sLSTM loop with its written-out gradient against the printed loop: outputs, states, gradients, ragged rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.dispatch import torch_forms
from slipstream.ops.slstm_scan import reference, slstm_flops, slstm_scan, slstm_step

B, T, H, K = 4, 9, 2, 3


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def draw(dtype=torch.float64, fresh=False):
    """gates, U, (h, c, n, m): fresh, or in the middle of a stream."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, 4, H, K), (4, H, K, K), *[(B, H, K)] * 4]
    gates, U, h, c, n, m = (torch.randn(s, dtype=dtype, generator=generator) for s in shapes)
    state = (h, c, n.abs() + 1, m)
    if fresh:
        state = (*(torch.zeros_like(h) for _ in range(3)), torch.full_like(m, -torch.inf))
    return (2 * gates).requires_grad_(), U.requires_grad_(), tuple(s.requires_grad_() for s in state)


def flat(result):
    return [result[0], *result[1]]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_it_is_the_loop_with_all_gradients(dtype, tol, fresh):
    gates, U, state = draw(dtype, fresh)
    outs = [flat(f(gates, U, state)) for f in (slstm_scan, reference)]
    weights = [torch.randn_like(v) for v in outs[1]]
    for got, want in zip(*outs):
        close(got, want, tol)
    leaves = [gates, U, *(state[:3] if fresh else state)]
    gradients = [torch.autograd.grad(sum((v * w).sum() for v, w in zip(o, weights)), leaves) for o in outs]
    for got, want in zip(*gradients):
        close(got, want, 10 * tol)


def test_outputs_alone_have_the_same_gradients():
    """Where the last state is not used, its gradient is absent."""
    gates, U, state = draw()
    got, want = (
        torch.autograd.grad(f(gates, U, state)[0].square().sum(), [gates, U, *state]) for f in (slstm_scan, reference)
    )
    for g, w in zip(got, want):
        close(g, w, 1e-11)


@pytest.mark.parametrize("lengths", [[0, T, 4, 1], [0, 0, 0, 0]], ids=str)
def test_padding_reaches_nothing(lengths):
    gates, U, state = draw()
    gates = gates.detach()
    for row, n in enumerate(lengths):
        gates[row, n:] = torch.nan
    y, last = slstm_scan(gates, U, state, torch.tensor(lengths))
    for row, n in enumerate(lengths):
        one = slice(row, row + 1)
        alone, final = reference(gates[one, :n], U, tuple(s[one] for s in state))
        close(y[one, :n], alone)
        for got, want in zip(last, final):
            close(got[one], want)


def test_gradients_of_ragged_rows_pass_finite_differences():
    gates, U, state = draw()
    lengths = torch.tensor([0, 3, 2, 1])
    assert torch.autograd.gradcheck(lambda g, *s: flat(slstm_scan(g[:, :3], U, s, lengths)), (gates, *state))


def test_packed_documents_are_rows():
    gates, U, state = draw()
    bounds = torch.tensor([0, 4, 4, 5, 9])
    y, last = slstm_scan(gates[:1], U, state, cu_seqlens=bounds)
    for row in range(B):
        piece, one = slice(bounds[row], bounds[row + 1]), slice(row, row + 1)
        alone, final = reference(gates[:1, piece], U, tuple(s[one] for s in state))
        close(y[:, piece], alone)
        for got, want in zip(last, final):
            close(got[one], want)


def test_extreme_gates_overflow_nothing():
    gates, U, state = draw(torch.float32, fresh=True)
    y, last = slstm_scan(gates.sign() * 1e4, U, state)
    assert all(v.isfinite().all() for v in (y, *last))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [gates, U]))


def test_no_tokens_leave_the_state():
    gates, U, state = draw()
    y, last = slstm_scan(gates[:, :0], U, state)
    assert y.shape == (B, 0, H, K)
    assert all(torch.equal(a, b) for a, b in zip(last, state))


def test_flops_are_those_torch_counts():
    gates, U, state = draw()
    with torch_forms(), FlopCounterMode(display=False) as counter:
        slstm_scan(gates, U, state)
    assert counter.get_total_flops() == slstm_flops(B * T, H, K)
    with torch_forms(), FlopCounterMode(display=False) as counter:
        slstm_step(gates[:, 0], U, state)
    assert counter.get_total_flops() == slstm_flops(B, H, K)
