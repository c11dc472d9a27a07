"""path_attention against its loop: outputs, carried keys, all gradients; cuts, ragged rows, a step, extremes, cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops import path_attention as ops
from slipstream.ops.attention import write_cache

B, T, H, G, K, V = 2, 23, 4, 2, 6, 5
NONE = torch.zeros(B, dtype=torch.long)


def inputs(tokens=T, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (H, K), "k": (G, K), "v": (G, V), "w": (G, K), "beta": (G,), "key_bias": (H,)}
    args = {n: torch.randn(B, tokens, *s, generator=g, dtype=dtype) for n, s in shapes.items()}
    return args | {"w": F.normalize(args["w"], dim=-1), "beta": 2 * args["beta"].sigmoid()}


def fresh(args, chunk_size, **more):
    none = {"past_k": args["k"][:, :0], "past_v": args["v"][:, :0], "past": NONE}
    return ops.path_attention(**args, **none, scale=0.3, chunk_size=chunk_size, **more)


def results(f, args):
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    outs = f(leaves)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=g, dtype=o.dtype) for o in outs]
    return [*outs, *torch.autograd.grad(outs, list(leaves.values()), weights)]


def turned(args):
    """All keys as the last token leaves them, one update a token."""
    keys = args["k"][:, :0]
    for t in range(args["k"].shape[1]):
        new = (args[n][:, t : t + 1] for n in ("w", "beta"))
        keys = torch.cat([ops.path_step(*new, keys), args["k"][:, t : t + 1]], 1)
    return keys


def close(got, want, tol=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 8, 64])
def test_the_chunked_form_is_the_definition(chunk_size):
    got = results(lambda a: fresh(a, chunk_size)[:2], inputs())
    close(got, results(lambda a: [ops.reference(**a, scale=0.3), turned(a)], inputs()))


def test_without_a_bias():
    args = inputs()
    del args["key_bias"]
    close([fresh(args, 4)[0]], [ops.reference(**args, scale=0.3)])


@pytest.mark.parametrize("rubbish", [1e4, torch.nan])
def test_ragged_rows_go_on_where_they_stopped(rubbish):
    args, lengths = inputs(), torch.tensor([9, 4])
    want, keys = ops.reference(**args, scale=0.3), turned(args)
    first = {n: t[:, :9].clone() for n, t in args.items()}
    for name in ("q", "k", "v", "w", "beta"):
        first[name][1, 4:] = rubbish
    o, new, _ = fresh(first, 4, lengths=lengths)
    close([o[0], o[1, :4]], [want[0, :9], want[1, :4]])
    room = torch.zeros(B, T, G, K, dtype=torch.float64)
    k, v = write_cache(room, new, NONE, lengths), write_cache(room[..., :V].clone(), first["v"], NONE, lengths)
    rows = torch.arange(B)[:, None], lengths[:, None] + torch.arange(T - 9)
    rest = {n: t[rows] for n, t in args.items() if n != "key_bias"}
    o, new, old = ops.path_attention(**rest, past_k=k, past_v=v, past=lengths, key_bias=args["key_bias"], scale=0.3)
    close([o], [want[rows]])
    close([write_cache(old, new, lengths)[0]], [keys[0]])


def test_float32_survives_turns_that_are_all_alike():
    args = inputs(tokens=512)
    args |= {"w": F.normalize(args["w"][:, :1] + 0.02 * args["w"], dim=-1), "beta": torch.full_like(args["beta"], 2.0)}
    want = fresh(args, 64)[0]
    got = fresh({n: t.float() for n, t in args.items()}, 64)[0]
    assert (got - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("tokens, chunk_size, exact", [(64, 8, True), (56, 8, True), (5, 64, True), (61, 8, False)])
def test_flops_are_counted_right(tokens, chunk_size, exact):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fresh(inputs(tokens), chunk_size)
    declared = ops.path_flops(tokens, B, H, G, K, V, chunk_size)
    assert abs(declared / counter.get_total_flops() - 1) < (1e-9 if exact else 0.05)
