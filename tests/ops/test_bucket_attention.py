"""bucket_attention against its definition: outputs and all gradients; rings at any cut, ragged rows, extremes, cost."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops import bucket_attention as ops
from slipstream.ops.attention import reference as full_attention

B, T, H, K, V, R, C = 2, 23, 3, 6, 5, 2, 4


def inputs(tokens=T, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(B, tokens, H, d, generator=g, dtype=dtype) for n, d in (("q", K), ("k", K), ("v", V))}


def buckets(tokens=T, n_buckets=C, rounds=R):
    return torch.randint(0, n_buckets, (B, tokens, H, rounds), generator=torch.Generator().manual_seed(1))


def empty_rings(window, n_buckets=C, rounds=R, dtype=torch.float64):
    dims = (B, H, rounds, n_buckets * window)
    k, v = (torch.zeros(*dims, d, dtype=dtype) for d in (K, V))
    return ops.Rings(k, v, torch.full((*dims, rounds), ops.EMPTY, dtype=torch.float64))


def results(f, args):
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    o = f(**leaves)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(2), dtype=o.dtype)
    return [o, *torch.autograd.grad(o, list(leaves.values()), weights)]


def close(got, want, tol=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("window", "rounds"), [(1, 1), (3, 1), (3, 3), (40, 2)])
def test_sorted_tiles_are_the_definition(window, rounds, own):
    ids = buckets(rounds=rounds)
    got = results(lambda **a: ops.bucket_attention(**a, bucket=ids, window=window, own=own), inputs())
    close(got, results(lambda **a: ops.reference(**a, bucket=ids, window=window, own=own), inputs()))


@pytest.mark.parametrize("tile", [8, 16])
def test_the_size_of_a_tile_changes_nothing(tile, monkeypatch):
    args, ids = inputs(100), buckets(100)
    want = results(lambda **a: ops.bucket_attention(**a, bucket=ids, window=9), args)
    monkeypatch.setattr(ops, "TILE", tile)
    close(results(lambda **a: ops.bucket_attention(**a, bucket=ids, window=9), args), want)


@pytest.mark.parametrize("own", [True, False])
def test_rings_carry_all_that_can_be_read_across_any_cut(own):
    """Pieces, none among them, and single steps; gradients through the rings."""
    ids, window = buckets(), 3

    def in_pieces(**args):
        rings, outs, t = empty_rings(window), [], 0
        for n in (5, 0, 7, 1, 1, 9):
            piece = {name: a[:, t : t + n] for name, a in (args | {"bucket": ids}).items()}
            run = ops.bucket_step if n == 1 else ops.bucket_prefill
            o, rings = run(**piece, window=window, rings=rings, own=own)
            outs.append(o)
            t += n
        return torch.cat(outs, 1)

    want = results(lambda **a: ops.reference(**a, bucket=ids, window=window, own=own), inputs())
    close(results(in_pieces, inputs()), want)
    with torch.no_grad():
        close([in_pieces(**inputs())], want[:1])


@pytest.mark.parametrize("rubbish", [1e4, torch.nan])
def test_ragged_rows_go_on_where_they_stopped(rubbish):
    args, ids, lengths, window = inputs(), buckets(), torch.tensor([9, 4]), 3
    want = ops.reference(**args, bucket=ids, window=window)
    first = {n: t[:, :9].clone() for n, t in args.items()}
    for t in first.values():
        t[1, 4:] = rubbish
    o, rings = ops.bucket_prefill(**first, bucket=ids[:, :9], window=window, rings=empty_rings(window), lengths=lengths)
    close([o[0], o[1, :4]], [want[0, :9], want[1, :4]])
    rows = torch.arange(B)[:, None], lengths[:, None] + torch.arange(T - 9)
    rest = {n: t[rows] for n, t in args.items()}
    o, _ = ops.bucket_prefill(**rest, bucket=ids[rows], window=window, rings=rings)
    close([o], [want[rows]])


@pytest.mark.parametrize("rounds", [1, 3])
def test_one_bucket_is_full_attention_however_often(rounds):
    ids = torch.zeros(B, T, H, rounds, dtype=torch.long)
    got = results(lambda **a: ops.bucket_attention(**a, bucket=ids, window=T), inputs())
    close(got, results(full_attention, inputs()))


def test_large_logits_stay_finite_over_a_long_sequence():
    args = {n: 50 * t.sign() for n, t in inputs(5000, torch.float32).items()}
    got = results(lambda **a: ops.bucket_attention(**a, bucket=buckets(5000), window=16, own=False), args)
    assert all(t.isfinite().all() for t in got)


@pytest.mark.parametrize("tokens", [1, 23, 150])
def test_flops_are_counted_right(tokens):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ops.bucket_prefill(**inputs(tokens), bucket=buckets(tokens), window=12, rings=empty_rings(12))
    assert ops.bucket_flops(tokens, B, H, K, V, R, 12, "prefill") == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ops.bucket_step(**inputs(1), bucket=buckets(1), window=12, rings=empty_rings(12))
    assert ops.bucket_flops(tokens, B, H, K, V, R, 12, "step") == counter.get_total_flops()
