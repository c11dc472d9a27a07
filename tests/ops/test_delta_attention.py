"""delta_values against its loop: values and all gradients; cuts, ragged rows, extremes, cost."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops import delta_attention as ops
from slipstream.ops.attention import write_cache

B, T, H, K, V = 2, 23, 3, 6, 5
NONE = torch.zeros(B, dtype=torch.long)


def inputs(tokens=T, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    args = {n: torch.randn(B, tokens, H, d, generator=g, dtype=dtype) for n, d in {"w": K, "k": K, "v": V}.items()}
    return args | {"beta": torch.rand(B, tokens, H, generator=g, dtype=dtype)}


def fresh(args, chunk_size, **more):
    none = {"past_k": args["k"][:, :0], "past_u": args["v"][:, :0], "past": NONE}
    return ops.delta_values(**args, **none, scale=0.7, chunk_size=chunk_size, **more)


def results(f, args):
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    u = f(leaves)
    weights = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=u.dtype)
    return [u, *torch.autograd.grad(u, list(leaves.values()), weights)]


def close(got, want, tol=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 64])
def test_the_chunked_form_is_the_definition(chunk_size):
    got = results(lambda a: fresh(a, chunk_size), inputs())
    close(got, results(lambda a: ops.reference(**a, scale=0.7), inputs()))


@pytest.mark.parametrize("rubbish", [1e4, torch.nan])
def test_ragged_rows_go_on_where_they_stopped(rubbish):
    args, lengths = inputs(), torch.tensor([9, 4])
    want = ops.reference(**args, scale=0.7)
    first = {n: t[:, :9].clone() for n, t in args.items()}
    for t in first.values():
        t[1, 4:] = rubbish
    u = fresh(first, 4, lengths=lengths)
    close([u[0], u[1, :4], u[1, 4:]], [want[0, :9], want[1, :4], torch.zeros_like(u[1, 4:])])
    room = torch.zeros(B, T, H, K, dtype=torch.float64)
    k, us = write_cache(room, first["k"], NONE, lengths), write_cache(room[..., :V].clone(), u, NONE, lengths)
    rows = torch.arange(B)[:, None], lengths[:, None] + torch.arange(T - 9)
    rest = {n: t[rows] for n, t in args.items()}
    close([ops.delta_values(**rest, past_k=k, past_u=us, past=lengths, scale=0.7)], [want[rows]])


def test_full_strength_and_large_logits_stay_finite():
    args = {n: 50 * t.sign() for n, t in inputs(tokens=300, dtype=torch.float32).items()} | {
        "beta": torch.ones(B, 300, H)
    }
    assert all(t.isfinite().all() for t in results(lambda a: fresh(a, 64), args))


@pytest.mark.parametrize("tokens", [1, 23, 64])
def test_flops_are_counted_right(tokens):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fresh(inputs(tokens), 8)
    assert ops.delta_values_flops(tokens, B, H, K, V, "prefill", 8) == counter.get_total_flops()
