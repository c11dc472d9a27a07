"""log_linear_scan against its own loop: outputs, states, every gradient; ragged and packed rows; few levels; cost."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.log_linear_scan import log_linear_flops, log_linear_scan, log_linear_step, reference

B, T, H, K, V = 3, 23, 2, 4, 5
SEEN = [0, 5, 12]  # a fresh row, and two that go on inside a chunk


def inputs(levels=7, dtype=torch.float64, tokens=T, seen=SEEN):
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (H, K), "k": (H, K), "v": (H, V), "level_scale": (H, levels)}
    args = {n: torch.randn(B, tokens, *s, generator=g, dtype=dtype) for n, s in shapes.items()}
    args["log_decay"] = -torch.rand(B, tokens, H, generator=g, dtype=dtype)
    past = {n: torch.randn(B, 16, *s, generator=g, dtype=dtype) for n, s in shapes.items()}
    past["log_decay"] = -torch.rand(B, 16, H, generator=g, dtype=dtype)
    states = [reference(**{n: t[b : b + 1, :n_seen] for n, t in past.items()})[1] for b, n_seen in enumerate(seen)]
    return args, tuple(torch.cat(parts) for parts in zip(*states))


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def results(op, args, state, **settings):
    """Output, final states, and the gradient of a fixed sum of them with respect to every input and filled level."""
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    S = state[0].clone().requires_grad_()
    o, (final, seen) = op(**leaves, state=(S, state[1]), scale=0.3, **settings)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in (o, final)]
    *grads, grad_S = torch.autograd.grad([o, final], [*leaves.values(), S], weights)
    return [o, final, seen, *grads, grad_S * (S != 0)]


@pytest.mark.parametrize("levels", [2, 3, 4, 7, 12])
@pytest.mark.parametrize("chunk_size", [1, 2, 4, 16, 64])
def test_the_chunked_form_is_the_rule(levels, chunk_size):
    case = inputs(levels)
    for got, want in zip(results(log_linear_scan, *case, chunk_size=chunk_size), results(reference, *case)):
        close(got, want)


def test_the_rule_is_the_sum_over_all_tokens():
    """The equation as printed, with its levels by the bits of t xor s."""
    args, _ = inputs(levels=4)
    G, want = args["log_decay"].cumsum(1), torch.zeros_like(args["v"])
    for t in range(T):
        for s in range(t + 1):
            scale = args["level_scale"][:, t, :, min((t ^ s).bit_length(), 3)] * (G[:, t] - G[:, s]).exp()
            match = (args["q"][:, t] * args["k"][:, s]).sum(-1) * scale
            want[:, t] += match[..., None] * args["v"][:, s]
    close(reference(**args)[0], want)


@pytest.mark.parametrize("levels", [3, 7])
def test_one_token_is_a_step(levels):
    args, state = inputs(levels)
    for t in range(T):
        token = {n: x[:, t : t + 1] for n, x in args.items()}
        got, new = log_linear_step(**token, state=state, scale=0.3)
        want, state = reference(**token, state=state, scale=0.3)
        close(got, want)
        close(new[0], state[0])
        assert new[1].tolist() == [n + t + 1 for n in SEEN]


@pytest.mark.parametrize("garbage", [1e4, torch.nan])
def test_padding_reaches_no_state_and_no_gradient(garbage):
    args, state = inputs()
    lengths = [T, 9, 0]
    padded = {n: t.clone() for n, t in args.items()}
    for t in padded.values():
        t[1, 9:] = t[2] = garbage
    leaves = {n: t.requires_grad_() for n, t in padded.items()}
    o, (S, seen) = log_linear_scan(**leaves, state=state, lengths=torch.tensor(lengths), chunk_size=4)
    for b, n in enumerate(lengths):
        row = {name: t[b : b + 1, :n] for name, t in args.items()}
        want, (final, after) = reference(**row, state=tuple(s[b : b + 1] for s in state))
        close(o[b : b + 1, :n], want)
        close(S[b : b + 1], final)
        assert seen[b] == after
    grads = torch.autograd.grad(o[1, :9].sum() + S.sum(), list(leaves.values()))
    assert all(g.isfinite().all() for g in grads)


def test_packed_documents_are_as_alone():
    args, _ = inputs()
    row, bounds = {n: t[:1] for n, t in args.items()}, [0, 5, 5, 6, T]
    o, (S, seen) = log_linear_scan(**row, cu_seqlens=torch.tensor(bounds), chunk_size=4)
    for i, (a, b) in enumerate(pairwise(bounds)):
        want, (final, _) = reference(**{n: t[:, a:b] for n, t in row.items()})
        close(o[:, a:b], want)
        close(S[i : i + 1], final)
        assert seen[i] == b - a


def test_no_tokens_leave_the_state():
    args, state = inputs(tokens=0)
    o, final = log_linear_scan(**args, state=state)
    assert o.shape == (B, 0, H, V)
    assert all(torch.equal(a, b) for a, b in zip(final, state))


def test_the_fastest_decay_overflows_nowhere():
    args, state = inputs(dtype=torch.float32, tokens=200)
    args["log_decay"] = args["log_decay"] * 300
    assert all(t.isfinite().all() for t in results(log_linear_scan, args, state))
    wide = log_linear_scan(**{n: t.double() for n, t in args.items()}, state=(state[0].double(), state[1]))
    close(log_linear_scan(**args, state=state)[0].double(), wide[0], 1e-4)


@pytest.mark.parametrize("levels", [2, 4, 9])
@pytest.mark.parametrize("tokens", [1, 23, 64, 65])
def test_flops_are_counted_right(tokens, levels):
    args, state = inputs(levels, tokens=tokens, seen=[0, 0, 0])
    with FlopCounterMode(display=False) as counter:
        log_linear_scan(**args, state=state, chunk_size=4)
    assert log_linear_flops(tokens, B, H, K, V, levels, "prefill", 4) == counter.get_total_flops()


def test_flops_of_a_step_are_counted_right():
    args, state = inputs(tokens=1)
    with FlopCounterMode(display=False) as counter:
        log_linear_step(**args, state=state)
    assert log_linear_flops(1, B, H, K, V, 7, "step") == counter.get_total_flops()
