"""Causal convolutions against torch's own over a left-padded line and against the loop; any cut, ragged rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.causal_conv import causal_conv, dilated_conv, dilated_conv_flops, reference

B, T, D, O = 3, 13, 4, 5


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def depthwise(conv_size):
    """The op with seeded weights, and torch's convolution of the whole line."""
    w, b = randn(D, conv_size), randn(D)
    past = conv_size - 1

    def torch_form(line):
        return F.conv1d(F.pad(line.mT, (past, 0)), w[:, None], b, groups=D).mT

    return lambda x, state=None, lengths=None: causal_conv(x, w, b, state, lengths), torch_form, past


def dense(conv_size, dilation):
    w, b = randn(O, D, conv_size), randn(O)
    past = (conv_size - 1) * dilation

    def torch_form(line):
        return F.conv1d(F.pad(line.mT, (past, 0)), w, b, dilation=dilation).mT

    return lambda x, state=None, lengths=None: dilated_conv(x, w, b, state, lengths, dilation), torch_form, past


FORMS = {
    "depthwise 1": depthwise(1),
    "depthwise 4": depthwise(4),
    "dense 3, dilation 1": dense(3, 1),
    "dense 2, dilation 8": dense(2, 8),
    "dense 3, dilation 4": dense(3, 4),
}


@pytest.fixture(params=list(FORMS))
def form(request):
    return FORMS[request.param]


def test_it_is_torchs_convolution(form):
    op, torch_form, past = form
    x = randn(B, T, D)
    y, state = op(x)
    close(y, torch_form(x))
    close(state, F.pad(x, (0, 0, past, 0))[:, T:])


@pytest.mark.parametrize("cuts", [(13,), (1, 12), (5, 0, 8), (1,) * 13], ids=str)
def test_any_cut_gives_the_same(form, cuts):
    op, torch_form, _ = form
    x, state, ys = randn(B, T, D), None, []
    for piece in x.split(cuts, 1):
        y, state = op(piece, state)
        ys.append(y)
    close(torch.cat(ys, 1), torch_form(x))
    close(state, op(x)[1])


def test_padding_reaches_nothing(form):
    op, torch_form, _ = form
    x, before, lengths = randn(B, T, D), randn(B, 6, D), [0, T, 4]
    for row, n in enumerate(lengths):
        x[row, n:] = torch.nan
    y, state = op(x, op(before)[1], torch.tensor(lengths))
    for row, n in enumerate(lengths):
        whole = torch.cat([before[row], x[row, :n]])[None]
        close(y[row, :n], torch_form(whole)[0, 6:])
        close(state[row : row + 1], op(whole)[1])


def test_gradients_pass_finite_differences():
    lengths = torch.tensor([0, 6, 3])
    x, state = randn(B, 6, D).requires_grad_(), randn(B, 2, D).requires_grad_()
    w, m, bias = (v.requires_grad_() for v in (randn(D, 3), randn(O, D, 2), randn(O)))
    assert torch.autograd.gradcheck(lambda *v: causal_conv(v[0], v[1], None, v[2], lengths), (x, w, state))
    assert torch.autograd.gradcheck(lambda *v: dilated_conv(*v, lengths, 2), (x, m, bias, state))


@pytest.mark.parametrize("dilation", [1, 3])
def test_the_loop_says_the_same(dilation):
    x, w, b = randn(B, T, D), randn(O, D, 3), randn(O)
    close(reference(x, w, b, dilation), dilated_conv(x, w, b, dilation=dilation)[0])
    diagonal = torch.diag_embed(randn(3, D)).permute(1, 2, 0)
    close(reference(x, diagonal), causal_conv(x, randn(3, D).T)[0])


def test_flops_are_those_torch_counts():
    with FlopCounterMode(display=False) as counter:
        dilated_conv(randn(B, T, D), randn(O, D, 3), dilation=2)
        causal_conv(randn(B, T, D), randn(D, 3))
    assert counter.get_total_flops() == dilated_conv_flops(B * T, D, O, 3)
