"""lti_scan against its loop and the long convolution it stands for: outputs, final state, gradients, any chunk."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.dispatch import torch_forms
from slipstream.ops.lti_scan import lti_scan, lti_scan_flops, lti_step, reference, zero_order_hold

B, T, D, N = 3, 23, 4, 5


def close(a, b, tol=1e-11):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def draw(tokens=T):
    """x, log_decay, weight, state."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, tokens, D, dtype=torch.float64, generator=generator)
    shapes = [(D, N), (D, N), (B, D, N)]
    log_decay, weight, state = (torch.randn(s, dtype=torch.complex128, generator=generator) for s in shapes)
    log_decay = torch.complex(-0.1 * log_decay.real.abs(), log_decay.imag)
    return [v.requires_grad_() for v in (x, log_decay, weight, state)]


@pytest.mark.parametrize("modes", [1, N, 37, 70, 131])
def test_without_gradients_it_is_the_loop_too(modes):
    """Where a kernel may run: fewer modes than a vector holds, and several vectors."""
    generator = torch.Generator().manual_seed(3)
    x, decay, weight, state = (
        torch.randn(s, dtype=t, generator=generator)
        for s, t in (
            ((2, 70, 3), torch.float64),
            ((3, modes), torch.complex128),
            ((3, modes), torch.complex128),
            ((2, 3, modes), torch.complex128),
        )
    )
    log_decay = torch.complex(-decay.real.abs(), decay.imag)
    for got, want in zip(lti_scan(x, log_decay, weight, state), reference(x, log_decay, weight, state)):
        close(got, want)


@pytest.mark.parametrize("chunk_size", [1, 4, 8, 23, 64])
def test_it_is_the_loop_with_all_gradients(chunk_size):
    arguments = draw()
    got, want = lti_scan(*arguments, chunk_size=chunk_size), reference(*arguments)
    weights = [torch.randn_like(v) for v in want]
    for g, w in zip(got, want):
        close(g, w)
    gradients = [
        torch.autograd.grad(sum((v * w).abs().sum() for v, w in zip(out, weights)), arguments) for out in (got, want)
    ]
    for g, w in zip(*gradients):
        close(g, w, 1e-10)


def test_it_is_a_long_convolution():
    x, log_decay, weight, _ = draw()
    kernel = torch.einsum("dn,dnt->dt", weight, torch.exp(log_decay[..., None] * torch.arange(T))).real
    product = torch.fft.rfft(x, n=2 * T, dim=1) * torch.fft.rfft(kernel.T, n=2 * T, dim=0)
    close(lti_scan(x, log_decay, weight, chunk_size=4)[0], torch.fft.irfft(product, n=2 * T, dim=1)[:, :T])


def test_zero_order_hold_integrates_an_input_that_is_held():
    """The weight is C times the integral of exp(s A) over one step, here by Simpson's rule."""
    _, A, C, _ = (v.detach() for v in draw())
    dt, places = 0.1 * torch.rand(D, 1, dtype=torch.float64), torch.linspace(0, 1, 101, dtype=torch.float64)
    log_decay, weight = zero_order_hold(A, C, dt)
    simpson = torch.tensor([1.0, *[4.0, 2.0] * 49, 4.0, 1.0], dtype=torch.float64) / 300
    held = (torch.exp(log_decay[..., None] * places) * simpson).sum(-1) * dt
    close(log_decay, dt * A)
    close(weight, C * held)


@pytest.mark.parametrize("lengths", [[0, T, 4], [8, 7, 1], [16, 20, 22]], ids=str)
def test_padding_reaches_nothing(lengths):
    x, log_decay, weight, state = (v.detach() for v in draw())
    for row, n in enumerate(lengths):
        x[row, n:] = torch.nan
    y, final = lti_scan(x, log_decay, weight, state, torch.tensor(lengths), chunk_size=4)
    for row, n in enumerate(lengths):
        alone, last = reference(x[row : row + 1, :n], log_decay, weight, state[row : row + 1])
        close(y[row : row + 1, :n], alone)
        close(final[row : row + 1], last)


def test_a_sequence_in_two_pieces_is_one():
    x, log_decay, weight, state = draw()
    first, middle = lti_scan(x[:, :9], log_decay, weight, state, chunk_size=4)
    second, final = lti_scan(x[:, 9:], log_decay, weight, middle, chunk_size=4)
    want, last = reference(x, log_decay, weight, state)
    close(torch.cat([first, second], 1), want)
    close(final, last)


def test_steps_are_the_loop():
    x, log_decay, weight, state = draw()
    want, last = reference(x, log_decay, weight, state)
    ys = []
    for t in range(T):
        y, state = lti_step(x[:, t], log_decay, weight, state)
        ys.append(y)
    close(torch.stack(ys, 1), want)
    close(state, last)


def test_no_tokens_leave_the_state():
    x, log_decay, weight, state = draw(0)
    y, final = lti_scan(x, log_decay, weight, state)
    assert y.shape == (B, 0, D)
    assert torch.equal(final, state)


def test_low_precision_keeps_a_wide_state():
    x, log_decay, weight, state = (v.detach() for v in draw())
    x = x.bfloat16()
    y, final = lti_scan(x, log_decay.to(torch.complex64), weight.to(torch.complex64))
    want, last = reference(x.double(), log_decay, weight, torch.zeros_like(state))
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.complex64)
    close(final.to(last.dtype), last, 1e-4)
    close(y.double(), want, 2e-2)


def test_modes_that_hardly_decay_stay_exact_over_many_tokens():
    log_decay = torch.complex(torch.full((1, 1), -1e-6), torch.full((1, 1), 0.3))
    x = torch.full((1, 16384, 1), 50.0)
    y, final = lti_scan(x, log_decay, torch.ones(1, 1, dtype=torch.complex64))
    wide = log_decay.to(torch.complex128)
    want, last = reference(x.double(), wide, torch.ones_like(wide), torch.zeros_like(wide)[None])
    close(y.double(), want, 2e-2)
    close(final.to(last.dtype), last, 2e-2)


@pytest.mark.parametrize(("tokens", "chunk_size"), [(23, 8), (64, 64), (5, 64), (64, 4)])
def test_flops_are_those_torch_counts(tokens, chunk_size):
    with torch_forms(), FlopCounterMode(display=False) as counter:
        lti_scan(*draw(tokens), chunk_size=chunk_size)
    assert counter.get_total_flops() == lti_scan_flops(tokens, B, D, N, chunk_size)
