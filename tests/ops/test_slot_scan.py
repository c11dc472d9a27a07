"""slot_scan against its own loop: outputs, states, every gradient; ragged and packed rows; fast decay; cost."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.chunks import SEGMENT
from slipstream.ops.dispatch import torch_forms
from slipstream.ops.slot_scan import reference, slot_flops, slot_scan, slot_step

B, T, H, K, V, M = 2, 23, 3, 8, 6, 5


def inputs(dtype=torch.float64, tokens=T):
    g = torch.Generator().manual_seed(0)
    shapes = {"q": K, "k": K, "v": V, "write": M}
    args = {n: torch.randn(B, tokens, H, width, generator=g, dtype=dtype) for n, width in shapes.items()}
    args["log_decay"] = -3 * torch.rand(B, tokens, H, M, generator=g, dtype=dtype)
    return args, tuple(torch.randn(B, H, *d, generator=g, dtype=dtype) for d in ((K, M), (M, V)))


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def results(op, args, state, **settings):
    """Output, final states, and the gradient of a fixed sum of them with respect to every input."""
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    entering = tuple(t.clone().requires_grad_() for t in state)
    o, final = op(**leaves, state=entering, scale=0.3, **settings)
    g = torch.Generator().manual_seed(1)
    outs = [o, *final]
    weights = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in outs]
    return [*outs, *torch.autograd.grad(outs, [*leaves.values(), *entering], weights)]


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 16, 64])
def test_the_chunked_form_is_the_rule(chunk_size):
    for got, want in zip(results(slot_scan, *inputs(), chunk_size=chunk_size), results(reference, *inputs())):
        close(got, want)


def test_segments_join():
    many = inputs(tokens=2 * SEGMENT * 2 + 3)
    for got, want in zip(results(slot_scan, *many, chunk_size=2), results(reference, *many)):
        close(got, want)


def test_without_a_state_it_starts_at_zero():
    args, state = inputs()
    zeros = tuple(torch.zeros_like(s) for s in state)
    close(slot_scan(**args, chunk_size=4)[0], reference(**args, state=zeros)[0])


def test_one_token_is_a_step():
    args, state = inputs(tokens=1)
    want = slot_scan(**args, state=state, scale=0.3)  # first: a step consumes its state
    got = slot_step(**args, state=state, scale=0.3)
    close(got[0], want[0])
    for a, b in zip(got[1], want[1]):
        close(a, b)


@pytest.mark.parametrize("garbage", [1e4, torch.nan])
def test_padding_reaches_no_state_and_no_gradient(garbage):
    args, state = inputs()
    padded = {n: t.clone() for n, t in args.items()}
    for t in padded.values():
        t[1, 9:] = garbage
    leaves = {n: t.requires_grad_() for n, t in padded.items()}
    o, final = slot_scan(**leaves, state=state, lengths=torch.tensor([T, 9]), chunk_size=4)
    want_o, want = reference(**{n: t[1:, :9] for n, t in args.items()}, state=tuple(s[1:] for s in state))
    close(o[1:, :9], want_o)
    for got, expected in zip(final, want):
        close(got[1:], expected)
    grads = torch.autograd.grad(o[1, :9].sum() + sum(s.sum() for s in final), list(leaves.values()))
    assert all(g.isfinite().all() for g in grads)


def test_packed_documents_are_as_alone():
    args, _ = inputs()
    row, bounds = {n: t[:1] for n, t in args.items()}, [0, 5, 5, 6, T]
    o, final = slot_scan(**row, cu_seqlens=torch.tensor(bounds), chunk_size=4)
    for i, (a, b) in enumerate(pairwise(bounds)):
        want_o, want = reference(**{n: t[:, a:b] for n, t in row.items()})
        close(o[:, a:b], want_o)
        for got, expected in zip(final, want):
            close(got[i : i + 1], expected)


def test_no_tokens_leave_the_state():
    args, state = inputs(tokens=0)
    o, final = slot_scan(**args, state=state)
    assert o.shape == (B, 0, H, V)
    assert all(torch.equal(a, b) for a, b in zip(final, state))


def test_the_fastest_decay_overflows_nowhere():
    args, state = inputs(torch.float32, tokens=200)
    args["log_decay"] = args["log_decay"] * 300
    assert all(t.isfinite().all() for t in results(slot_scan, args, state))
    wide = slot_scan(**{n: t.double() for n, t in args.items()}, state=tuple(s.double() for s in state))
    close(slot_scan(**args, state=state)[0].double(), wide[0], 1e-4)


@pytest.mark.parametrize("tokens", [1, 23, 64, 65])
def test_flops_are_counted_right(tokens):
    args, state = inputs(tokens=tokens)
    with torch_forms(), FlopCounterMode(display=False) as counter:
        slot_scan(**args, state=state, chunk_size=16)
    assert slot_flops(tokens, B, H, K, V, M, "prefill", 16) == counter.get_total_flops()
