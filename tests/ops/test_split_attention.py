"""Attention over keys that are kept in parts, and over keys and values that are kept as factors, against their definitions."""

from __future__ import annotations

import pytest
import torch

from slipstream.ops import factored_attention as factored
from slipstream.ops import split_attention as split

B, T, S, H, V, SCALE = 2, 5, 9, 4, 6, 0.4
PAST = torch.tensor([4, 1])
draw = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=draw).requires_grad_()


def at(rows, past=PAST):
    """The T tokens of each row from its own place on."""
    return torch.stack([row[p : p + T] for row, p in zip(rows, past.tolist())])


def same(got, want, leaves):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    seed = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad((o * seed).sum(), leaves, retain_graph=True) for o in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads", [(1, 1, 1), (2, 1, 4), (4, 2, 2)])
def test_parts_are_one_key(heads):
    """Also where the cache is longer than the row (what stands behind is another token's), and rows are of unequal length."""
    first, second, values = heads
    q, u = random(B, S, H, 3), random(B, S, H, 2)
    k, r, v = random(B, S, first, 3), random(B, S, second, 2), random(B, S, values, V)
    got = split.split_attention([(at(q), k), (at(u), r)], v, PAST, SCALE)
    same(got, at(split.reference([(q, k), (u, r)], v, SCALE)), (q, u, k, r, v))


def test_a_part_may_be_the_values_themselves():
    q, u, r, v = random(B, S, H, V), random(B, S, H, 2), random(B, S, 1, 2), random(B, S, 2, V)
    got = split.split_attention([(at(q), v), (at(u), r)], v, PAST, SCALE)
    same(got, at(split.reference([(q, v), (u, r)], v, SCALE)), (q, u, r, v))


def test_factors_are_what_they_multiply_to():
    ranks = {"q": 3, "k": 2, "v": 1}
    leaves = {n: (random(B, S, H, r), random(B, S, r, V)) for n, r in ranks.items()}
    q, k, v = (factored.Factors(*pair) for pair in leaves.values())
    got = factored.factored_attention(factored.Factors(at(q.a), at(q.b)), k, v, PAST, SCALE)
    same(got, at(factored.reference(q, k, v, SCALE)), [t for pair in leaves.values() for t in pair])


def test_large_logits_do_not_overflow():
    q, k, v = (random(B, S, 1, V).float().detach() for _ in range(3))
    o = split.split_attention([(1e3 * at(q), 1e3 * k)], v, PAST, SCALE)
    factors = [factored.Factors(torch.ones(B, S, 1, 1), 1e3 * x) for x in (q, k, v)]
    f = factored.factored_attention(factored.Factors(at(factors[0].a), at(factors[0].b)), *factors[1:], PAST, SCALE)
    assert o.isfinite().all() and f.isfinite().all()
