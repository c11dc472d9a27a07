"""mesa_scan against its loop and against a direct solution: outputs, state, all gradients; a step, ragged rows, cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops import mesa_scan as ops
from slipstream.ops.chunks import SEGMENT

B, T, H, K, V = 2, 23, 3, 6, 5


def inputs(tokens=T, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    args = {n: torch.randn(B, tokens, H, d, generator=g, dtype=dtype) for n, d in {"q": K, "k": K, "v": V}.items()}
    gates = {n: torch.rand(B, tokens, H, generator=g, dtype=dtype) for n in ("beta", "log_decay")}
    lam = 0.25 + torch.rand(H, K, generator=g, dtype=dtype)
    return args | {"k": F.normalize(args["k"], dim=-1), **gates, "log_decay": -gates["log_decay"], "lam": lam}


def loop(**args):
    o, R, G = ops.reference(**args)
    return o, torch.cat([R, G], -1)


def results(f, args, **settings):
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    outs = f(**leaves, **settings)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=g, dtype=o.dtype) for o in outs]
    return [*outs, *torch.autograd.grad(outs, list(leaves.values()), weights)]


def close(got, want, tol=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_the_chunked_form_is_the_rule(chunk_size, n_steps):
    close(
        results(ops.mesa_scan, inputs(), n_steps=n_steps, chunk_size=chunk_size),
        results(loop, inputs(), n_steps=n_steps),
    )


def test_segments_join():
    args = inputs(tokens=2 * SEGMENT * 2 + 3)
    close(results(ops.mesa_scan, args, n_steps=2, chunk_size=2), results(loop, args, n_steps=2))


def test_many_steps_near_the_direct_solution():
    args = inputs()
    o, S = ops.mesa_scan(**args, n_steps=30)
    R, G = S.split([K, V], -1)
    x = torch.linalg.solve(R + torch.diag_embed(args["lam"]), args["q"][:, -1])
    close([o[:, -1]], [torch.einsum("bhkv,bhk->bhv", G, x)], 2e-3)


def test_steps_and_ragged_pieces_go_on():
    args, lengths = inputs(), torch.tensor([T, 9])
    lam = args.pop("lam")
    soiled = {n: t.clone() for n, t in args.items()}
    for t in soiled.values():
        t[1, 9:] = torch.nan
    o, S = ops.mesa_scan(**soiled, lam=lam, lengths=lengths, n_steps=3, chunk_size=4)
    want_o, want_S = loop(**{n: t[1:, :9] for n, t in args.items()}, lam=lam, n_steps=3)
    close([o[1:, :9], S[1:]], [want_o, want_S])
    more, _ = ops.mesa_step(**{n: t[1:, 9:10] for n, t in args.items()}, lam=lam, state=S[1:], n_steps=3)
    close([more], [loop(**{n: t[1:, :10] for n, t in args.items()}, lam=lam, n_steps=3)[0][:, 9:]])


def test_no_tokens_leave_the_state():
    S = torch.randn(B, H, K, K + V, dtype=torch.float64)
    o, after = ops.mesa_scan(**inputs(tokens=0), state=S)
    assert o.shape == (B, 0, H, V)
    assert torch.equal(after, S)


def test_gradients_stay_finite_long_after_convergence():
    args = inputs(tokens=200, dtype=torch.float32)
    assert all(t.isfinite().all() for t in results(ops.mesa_scan, args, n_steps=60))


@pytest.mark.parametrize("tokens", [1, 23, 64])
def test_flops_are_counted_right(tokens):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ops.mesa_scan(**inputs(tokens), n_steps=3, chunk_size=8)
    assert ops.mesa_flops(tokens, B, H, K, V, "prefill", 3, 8) == counter.get_total_flops()
