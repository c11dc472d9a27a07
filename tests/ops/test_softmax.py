"""One tile of softmax attention against the written-out sum; parts merged against the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slipstream.ops.softmax import Softmax, merge, read, read_with_lse, with_sinks

B, T, S, H, G, K, V = 2, 5, 7, 4, 2, 6, 3
SETTINGS = {
    "plain": Softmax(),
    "scaled": Softmax(scale=0.3),
    "capped": Softmax(cap=2.0),
    "sinks": Softmax(sinks=torch.tensor([0.5, -3.0, 0.0, 2.0], dtype=torch.float64)),
}


def lines() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(B, *dims, dtype=torch.float64, generator=draw, requires_grad=True)
        for dims in ((T, H, K), (S, G, K), (S, G, V))
    )
    mask = torch.rand(B, H, T, S, generator=draw) < 0.6
    mask[0, :, 2] = False  # a query that meets no key
    return q, k, v, mask


def definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softmax: Softmax) -> Tensor:
    """The sum of the docstring, query by query and head by head."""
    o = torch.zeros(B, T, H, V, dtype=q.dtype)
    for b, t, h in torch.cartesian_prod(torch.arange(B), torch.arange(T), torch.arange(H)).tolist():
        g = h // (H // G)
        logits = k[b, :, g] @ q[b, t, h] * (K**-0.5 if softmax.scale is None else softmax.scale)
        logits = logits if softmax.cap is None else softmax.cap * torch.tanh(logits / softmax.cap)
        weights = logits[mask[b, h, t]].exp()
        sink = 0.0 if softmax.sinks is None else softmax.sinks[h].exp()
        if mask[b, h, t].any():
            o[b, t, h] = weights @ v[b, mask[b, h, t], g] / (weights.sum() + sink)
    return o


@pytest.mark.parametrize("name", SETTINGS)
def test_a_tile_is_its_definition_and_so_are_its_gradients(name: str):
    q, k, v, mask = lines()
    seed = torch.randn(B, T, H, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ways = [
        read(q, k, v, mask, SETTINGS[name]),
        with_sinks(*read_with_lse(q, k, v, mask, SETTINGS[name]), SETTINGS[name]),
    ]
    want = definition(q, k, v, mask, SETTINGS[name])
    for o in ways:
        torch.testing.assert_close(o, want, rtol=1e-10, atol=1e-10)
        got = torch.autograd.grad((o * seed).sum(), (q, k, v))
        for a, b in zip(got, torch.autograd.grad((want * seed).sum(), (q, k, v), retain_graph=True)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_parts_merge_into_the_whole(name: str):
    q, k, v, mask = lines()
    parts = [
        read_with_lse(q, k[:, part], v[:, part], mask[..., part], SETTINGS[name])
        for part in (slice(0, 3), slice(3, 3), slice(3, S))
    ]
    o, lse = merge(parts)
    want, want_lse = read_with_lse(q, k, v, mask, SETTINGS[name])
    torch.testing.assert_close(o, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, want_lse, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(o.square().sum() + lse[lse.isfinite()].sum(), (q, k, v))
    wanted = torch.autograd.grad(want.square().sum() + want_lse[want_lse.isfinite()].sum(), (q, k, v))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_query_that_meets_no_key_reads_zero_with_clean_gradients():
    q, k, v, _ = lines()
    nobody = torch.zeros(B, 1, T, S, dtype=torch.bool)
    for softmax in SETTINGS.values():
        o = read(q, k, v, nobody, softmax)
        assert torch.equal(o, torch.zeros_like(o))
        assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), (q, k, v)))


def test_large_logits_do_not_overflow():
    q, k, v, mask = (x.float().detach() if x.is_floating_point() else x for x in lines())
    for softmax in SETTINGS.values():
        o, lse = read_with_lse(1e3 * q, 1e3 * k, v, mask, softmax)
        assert o.isfinite().all() and not lse.isnan().any()
