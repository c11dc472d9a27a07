"""outer_scan against its own loop: outputs, states, every gradient; ragged and packed rows; fast decay; cost."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.chunks import SEGMENT
from slipstream.ops.dispatch import torch_forms
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step, reference

B, T, H, K, V = 2, 23, 3, 8, 6
DECAYS = {"none": None, "constant": (H,), "head": (B, T, H), "channel": (B, T, H, K)}
KINDS = {"none": "none", "constant": "head", "head": "head", "channel": "channel"}


def inputs(decay, dtype=torch.float64, tokens=T):
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (B, tokens, H, K), "k": (B, tokens, H, K), "v": (B, tokens, H, V), "state": (B, H, K, V)}
    args = {n: torch.randn(s, generator=g, dtype=dtype) for n, s in shapes.items()}
    if DECAYS[decay] is not None:
        shape = tuple(tokens if n == T else n for n in DECAYS[decay])
        args["log_decay"] = -3 * torch.rand(shape, generator=g, dtype=dtype)
    return args


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def results(op, args, **settings):
    """Output, final state, and the gradient of a fixed sum of both with respect to every input."""
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    o, S = op(**leaves, **settings)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in (o, S)]
    return [o, S, *torch.autograd.grad([o, S], list(leaves.values()), weights)]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("chunk_size", [1, 4, 5, 16, 64])
def test_the_chunked_form_is_the_rule(decay, chunk_size):
    args = inputs(decay)
    expected = results(reference, args, scale=0.3)
    for got, want in zip(results(outer_scan, args, scale=0.3, chunk_size=chunk_size), expected):
        close(got, want)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_with_a_bonus_the_read_comes_first(decay, chunk_size):
    args = inputs(decay) | {"bonus": torch.randn(H, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)}
    expected = results(reference, args, scale=0.3)
    for got, want in zip(results(outer_scan, args, scale=0.3, chunk_size=chunk_size), expected):
        close(got, want)
    token = {n: t[:, :1] if t.ndim > 2 and n != "state" else t for n, t in args.items()} | {
        n: args.get(n) for n in ("log_decay",) if decay in ("none", "constant")
    }
    for got, want in zip(
        outer_step(**token | {"state": token["state"].clone()}, scale=0.3), reference(**token, scale=0.3)
    ):
        close(got, want)


@pytest.mark.parametrize("decay", DECAYS)
def test_segments_join(decay):
    args = inputs(decay, tokens=2 * SEGMENT * 2 + 3)
    for got, want in zip(results(outer_scan, args, chunk_size=2), results(reference, args)):
        close(got, want)


@pytest.mark.parametrize("decay", DECAYS)
def test_one_token_is_a_step(decay):
    args = inputs(decay, tokens=1)
    args.setdefault("log_decay", None)
    o, S = outer_step(**args | {"state": args["state"].clone()}, scale=0.3)
    want_o, want_S = outer_scan(**args, scale=0.3)
    close(o, want_o)
    close(S, want_S)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("garbage", [1e4, torch.nan])
def test_padding_reaches_no_state_and_no_gradient(decay, garbage):
    args, lengths = inputs(decay), torch.tensor([T, 9])
    padded = {n: t.clone() for n, t in args.items()}
    for name, t in padded.items():
        if t.ndim > 1 and name != "state":
            t[1, 9:] = garbage
    leaves = {n: t.requires_grad_() for n, t in padded.items()}
    o, S = outer_scan(**leaves, lengths=lengths, chunk_size=4)
    short = {n: t if t.ndim == 1 else t[1:] if n == "state" else t[1:, :9] for n, t in args.items()}
    want_o, want_S = reference(**short)
    close(o[1:, :9], want_o)
    close(S[1:], want_S)
    grads = torch.autograd.grad(o[1, :9].sum() + S.sum(), list(leaves.values()))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_documents_are_as_alone(decay):
    args = inputs(decay)
    row = {n: t if n == "log_decay" and decay == "constant" else t[:1] for n, t in args.items() if n != "state"}
    bounds = [0, 5, 5, 6, T]
    o, S = outer_scan(**row, cu_seqlens=torch.tensor(bounds), chunk_size=4)
    for i, (a, b) in enumerate(pairwise(bounds)):
        want_o, want_S = reference(**{n: t if t.ndim == 1 else t[:, a:b] for n, t in row.items()})
        close(o[:, a:b], want_o)
        close(S[i : i + 1], want_S)


@pytest.mark.parametrize("decay", DECAYS)
def test_no_tokens_leave_the_state(decay):
    args = inputs(decay, tokens=0)
    o, S = outer_scan(**args)
    assert o.shape == (B, 0, H, V)
    assert torch.equal(S, args["state"])


@pytest.mark.parametrize("decay", ["constant", "head", "channel"])
def test_the_fastest_decay_overflows_nowhere(decay):
    args = inputs(decay, torch.float32, tokens=200)
    args["log_decay"] = args["log_decay"] * 300
    got = results(outer_scan, args)
    assert all(t.isfinite().all() for t in got)
    wide = outer_scan(**{n: t.double() for n, t in args.items()})
    close(got[0].double(), wide[0], 1e-4)


@pytest.mark.parametrize("decay", DECAYS)
def test_half_precision_keeps_a_wide_state(decay):
    args = {n: t.bfloat16() for n, t in inputs(decay).items()}
    o, S = outer_scan(**args, chunk_size=4)
    assert (o.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    want, _ = reference(**{n: t.double() for n, t in args.items()})
    assert (o.double() - want).abs().max() < 1e-2 * want.abs().max()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [1, 23, 64, 65])
def test_flops_are_counted_right(decay, tokens):
    args = inputs(decay, tokens=tokens)
    with torch_forms(), FlopCounterMode(display=False) as counter:
        outer_scan(**args, chunk_size=16)
    assert outer_flops(tokens, B, H, K, V, "prefill", KINDS[decay], 16) == counter.get_total_flops()
