"""peephole_scan and semilinear_scan against their loops: outputs, states, every gradient; ragged rows, long lines."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops import peephole_scan as peephole
from slipstream.ops import semilinear_scan as semilinear
from slipstream.ops.dispatch import torch_forms

B, T, D, H = 3, 11, 5, 3


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def draw(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


class Peephole:
    """u and a along time, then v and the state."""

    n_lines, scan, step = 2, staticmethod(peephole.peephole_scan), staticmethod(peephole.peephole_step)
    reference = staticmethod(peephole.reference)

    @staticmethod
    def arguments(tokens=T, dtype=torch.float64):
        return draw((B, tokens, D), (B, tokens, D), (D,), (B, D), dtype=dtype)


class Semilinear:
    """x along time, then U and the state; the first H of D channels are squashed."""

    n_lines = 1

    @staticmethod
    def scan(x, U, state, *args, **kwargs):
        return semilinear.semilinear_scan(x, U, H, state, *args, **kwargs)

    @staticmethod
    def step(x, U, state):
        return semilinear.semilinear_step(x, U, H, state)

    @staticmethod
    def reference(x, U, state):
        return semilinear.reference(x, U, H, state)

    @staticmethod
    def arguments(tokens=T, dtype=torch.float64):
        x, U, state = draw((B, tokens, D), (D, D), (B, D), dtype=dtype)
        return [x, (0.3 * U).detach().requires_grad_(), state]


@pytest.fixture(params=[Peephole, Semilinear])
def op(request):
    return request.param


def test_it_is_the_loop_with_all_gradients(op):
    arguments = op.arguments()
    outs = [op.scan(*arguments), op.reference(*arguments)]
    for got, want in zip(*outs):
        close(got, want)
    weights = [torch.randn_like(v) for v in outs[1]]
    gradients = [torch.autograd.grad(sum((v * w).sum() for v, w in zip(o, weights)), arguments) for o in outs]
    for got, want in zip(*gradients):
        close(got, want)


def test_gradients_of_ragged_rows_pass_finite_differences(op):
    lengths = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda *v: op.scan(*v, lengths), op.arguments(tokens=4))


def test_padding_reaches_nothing(op):
    arguments = [v.detach() for v in op.arguments()]
    lengths = [0, T, 4]
    for line in arguments[: op.n_lines]:
        for row, n in enumerate(lengths):
            line[row, n:] = torch.nan
    y, final = op.scan(*arguments, torch.tensor(lengths))
    *lines, weight, state = arguments
    for row, n in enumerate(lengths):
        alone, last = op.reference(*(v[row : row + 1, :n] for v in lines), weight, state[row : row + 1])
        close(y[row : row + 1, :n], alone)
        close(final[row : row + 1], last)


def test_packed_documents_are_as_alone(op):
    *lines, weight, state = (v.detach() for v in op.arguments())
    lines = [v.flatten(0, 1)[None] for v in lines]
    bounds = [0, 5, 5, B * T]
    y, final = op.scan(*lines, weight, state, cu_seqlens=torch.tensor(bounds))
    alone = [
        op.reference(*(v[:, i:j] for v in lines), weight, state[n, None]) for n, (i, j) in enumerate(pairwise(bounds))
    ]
    close(y, torch.cat([a for a, _ in alone], 1))
    close(final, torch.cat([s for _, s in alone]))


def test_steps_are_the_loop(op):
    *lines, weight, state = op.arguments()
    want, _ = op.reference(*lines, weight, state)
    for t in range(T):
        state = op.step(*(v[:, t] for v in lines), weight, state)
        close(state, want[:, t])


def test_no_tokens_leave_the_state(op):
    arguments = op.arguments(tokens=0)
    y, final = op.scan(*arguments)
    assert y.shape == (B, 0, D)
    assert torch.equal(final, arguments[-1])
    (y.sum() + final.sum()).backward()
    close(arguments[-1].grad, torch.ones(B, D, dtype=torch.float64))


def test_the_inputs_are_left_alone_and_the_state_holds_no_sequence(op):
    arguments = op.arguments(tokens=50)
    copies = [v.detach().clone() for v in arguments]
    _, final = op.scan(*arguments)
    assert all(torch.equal(v, c) for v, c in zip(arguments, copies))
    assert final.untyped_storage().nbytes() == final.nbytes


def test_low_precision_keeps_a_wide_state(op):
    arguments = [v.detach().bfloat16() for v in op.arguments(tokens=100, dtype=torch.float32)]
    y, final = op.scan(*arguments)
    want, last = op.reference(*(v.double() for v in arguments))
    assert final.dtype == torch.float32
    close(final.double(), last, 1e-5)
    close(y.double(), want, 2e-2)


def test_it_holds_over_many_tokens(op):
    *lines, weight, state = (v.detach() for v in op.arguments(tokens=16384, dtype=torch.float32))
    lines = [(50 * v[:1]).requires_grad_() for v in lines]
    y, _ = op.scan(*lines, weight, state[:1])
    y.sum().backward()
    assert y.isfinite().all()
    assert all(v.grad.isfinite().all() for v in lines)


def test_flops_are_those_torch_counts():
    with torch_forms(), FlopCounterMode(display=False) as counter, torch.no_grad():
        Semilinear.scan(*Semilinear.arguments())
    assert counter.get_total_flops() == semilinear.semilinear_flops(B * T, D)
