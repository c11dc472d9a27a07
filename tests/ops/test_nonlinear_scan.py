"""RNN, LSTM and GRU by torch's kernels against the loop that is printed: outputs, states, gradients, ragged rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops import nonlinear_scan as ops
from slipstream.ops.dispatch import torch_forms

B, T, D, H = 4, 9, 3, 5
FORMS = {
    "rnn": (ops.rnn_scan, ops.rnn_step, ops.rnn_reference, 1),
    "lstm": (ops.lstm_scan, ops.lstm_step, ops.lstm_reference, 4),
    "gru": (ops.gru_scan, ops.gru_step, ops.gru_reference, 3),
}


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def flat(result):
    """(y, h) or (y, (h, c)) as a list."""
    y, state = result
    return [y, *state] if isinstance(state, tuple) else [y, state]


@pytest.fixture(params=list(FORMS))
def form(request):
    return FORMS[request.param]


def draw(n_gates, dtype=torch.float64):
    """x, weights, state."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, D), (n_gates * H, D), (n_gates * H, H), (n_gates * H,), (n_gates * H,), (B, H), (B, H)]
    x, *weights, h, c = (torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes)
    return x, weights, (h, c) if n_gates == 4 else h


def leaves(x, weights, state):
    return [x, *weights, *(state if isinstance(state, tuple) else [state])]


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_it_is_the_loop_with_all_gradients(form, dtype, tol):
    scan, _, reference, n_gates = form
    arguments = draw(n_gates, dtype)
    outs = [flat(scan(*arguments)), flat(reference(*arguments))]
    weights = [torch.randn_like(v) for v in outs[1]]
    for got, want in zip(*outs):
        close(got, want, tol)
    gradients = [torch.autograd.grad(sum((v * w).sum() for v, w in zip(o, weights)), leaves(*arguments)) for o in outs]
    for got, want in zip(*gradients):
        close(got, want, 10 * tol)


@pytest.mark.parametrize("lengths", [[0, T, 4, 1], [0, 0, 0, 0], [2, 9, 9, 3]], ids=str)
def test_padding_reaches_nothing(form, lengths):
    scan, _, reference, n_gates = form
    x, weights, state = draw(n_gates)
    x = x.detach()
    for row, n in enumerate(lengths):
        x[row, n:] = torch.nan
    y, *final = flat(scan(x, weights, state, torch.tensor(lengths)))
    for row, n in enumerate(lengths):
        one = tuple(s[row : row + 1] for s in state) if isinstance(state, tuple) else state[row : row + 1]
        alone, *last = flat(reference(x[row : row + 1, :n], weights, one))
        close(y[row : row + 1, :n], alone)
        for got, want in zip(final, last):
            close(got[row : row + 1], want)


def test_gradients_of_ragged_rows_pass_finite_differences(form):
    scan, _, _, n_gates = form
    x, weights, state = draw(n_gates)
    lengths = torch.tensor([0, 3, 2, 1])
    W, *others = weights
    assert torch.autograd.gradcheck(lambda x, W: flat(scan(x[:, :3], [W, *others], state, lengths)), (x, W))


def test_steps_are_the_loop(form):
    _, step, reference, n_gates = form
    x, weights, state = draw(n_gates)
    want, *last = flat(reference(x, weights, state))
    for t in range(T):
        state = step(x[:, t], weights, state)
        close(state[0] if n_gates == 4 else state, want[:, t])
    for got, w in zip(flat((None, state))[1:], last):
        close(got, w)


def test_no_tokens_leave_the_state(form):
    scan, _, _, n_gates = form
    x, weights, state = draw(n_gates)
    y, *final = flat(scan(x[:, :0], weights, state))
    assert y.shape == (B, 0, H)
    assert all(torch.equal(got, want) for got, want in zip(final, leaves(x, weights, state)[5:]))


def test_low_precision_keeps_a_wide_state(form):
    scan, _, reference, n_gates = form
    x, weights, state = draw(n_gates, torch.float32)
    y, *final = flat(scan(x.bfloat16(), [w.bfloat16() for w in weights], state))
    want, *last = flat(reference(x.bfloat16().float(), [w.bfloat16().float() for w in weights], state))
    assert y.dtype == torch.bfloat16
    close(y.float(), want, 1e-2)
    for got, w in zip(final, last):
        assert got.dtype == torch.float32
        close(got, w, 1e-5)


def test_flops_are_those_torch_counts_in_float64(form):
    """In float32 torch may run one fused kernel that its counter does not see."""
    scan, _, _, n_gates = form
    with torch_forms(), FlopCounterMode(display=False) as counter:
        scan(*draw(n_gates))
    assert counter.get_total_flops() == ops.nonlinear_scan_flops(B * T, n_gates, D, H)
