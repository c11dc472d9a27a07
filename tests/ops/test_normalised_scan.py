"""normalised_scan against its own loop and against the definition: a mean of values under weights k . q."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.dispatch import torch_forms
from slipstream.ops.normalised_scan import normalised_flops, normalised_scan, normalised_step, reference

B, T, H, K, V = 2, 23, 3, 8, 5


def inputs(decays, dtype=torch.float64, tokens=T):
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (B, tokens, H, K), "k": (B, tokens, H, K), "v": (B, tokens, H, V), "state": (B, H, K, V + 1)}
    args = {n: torch.rand(s, generator=g, dtype=dtype) for n, s in shapes.items()}
    args["log_decay"] = -3 * torch.rand(B, tokens, H, generator=g, dtype=dtype) if decays else None
    return args


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def results(op, args, **settings):
    """Output, final state, and the gradient of a fixed sum of both with respect to every input."""
    leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in args.items()}
    o, S = op(**leaves, **settings)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in (o, S)]
    return [o, S, *torch.autograd.grad([o, S], [t for t in leaves.values() if t is not None], weights)]


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_the_chunked_form_is_the_rule(decays, chunk_size):
    args = inputs(decays)
    expected = results(reference, args, eps=1e-3)
    for got, want in zip(results(normalised_scan, args, eps=1e-3, chunk_size=chunk_size), expected):
        close(got, want)


@pytest.mark.parametrize("decays", [False, True])
def test_a_step_is_one_token(decays):
    args = inputs(decays, tokens=1)
    wanted = reference(**args, eps=1e-3)  # first: a step consumes its state
    for got, want in zip(normalised_step(**args, eps=1e-3), wanted):
        close(got, want)


def test_it_is_the_mean_under_the_weights():
    args = inputs(False) | {"state": torch.zeros(B, H, K, V + 1, dtype=torch.float64)}
    weights = torch.einsum("bthk,bshk->bhts", args["q"], args["k"]).tril()
    mean = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), args["v"])
    close(normalised_scan(**args, eps=0.0)[0], mean)


def test_a_negative_sum_counts_as_zero():
    args = inputs(False, tokens=1) | {"state": torch.zeros(B, H, K, V + 1, dtype=torch.float64)}
    weight = torch.einsum("bthk,bthk->bth", args["q"], -args["k"])[..., None]
    assert bool((weight < 0).all())
    for op in (normalised_scan, normalised_step, reference):
        given = args | {"k": -args["k"], "state": args["state"].clone()}
        close(op(**given, eps=0.5)[0], weight * args["v"] / 0.5)


def test_padding_reaches_no_state_and_no_gradient():
    args, lengths = inputs(True), torch.tensor([T, 6])
    soiled = {n: t.clone().requires_grad_() for n, t in args.items()}
    with torch.no_grad():
        for name in ("q", "k", "v", "log_decay"):
            soiled[name][1, 6:] = torch.nan
    o, S = normalised_scan(**soiled, lengths=lengths, eps=1e-30, chunk_size=4)
    alone = {n: t[1:, :6] if n != "state" else t[1:] for n, t in args.items()}
    want_o, want_S = reference(**alone, eps=1e-30)
    close(o[1:, :6], want_o)
    close(S[1:], want_S)
    (o[0].sum() + o[1, :6].sum() + S.sum()).backward()
    assert all(bool(t.grad.isfinite().all()) for t in soiled.values())


@pytest.mark.parametrize("tokens", [1, T, 64])
def test_flops_are_those_counted(tokens):
    args = inputs(True, tokens=tokens)
    with torch_forms(), FlopCounterMode(display=False) as counter:
        normalised_scan(**args, chunk_size=16)
    assert counter.get_total_flops() == normalised_flops(tokens, B, H, K, V, "forward", decays=True, chunk_size=16)
