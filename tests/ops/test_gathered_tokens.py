"""Attention of a step over tokens it has chosen, against its definition: layouts of caches, shared heads, sinks, caps, none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slipstream.ops.chosen_attention import gathered_tokens
from slipstream.ops.softmax import PLAIN, Softmax

B, T, H, S, K, V, N = 2, 3, 8, 40, 5, 19, 11  # no vector divides them
SETTINGS = {
    "plain": PLAIN,
    "scaled and capped": Softmax(0.7, cap=1.5),
    "sinks": Softmax(sinks=torch.linspace(-2, 2, H, dtype=torch.float64)),
}


def given(G: int, C: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """T queries that choose N of the tokens before S, some none."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(B, n, h, w, dtype=torch.float64, generator=draw).to(dtype)
        for n, h, w in ((T, H, K), (S, G, K), (S, G, V))
    )
    chosen = torch.stack([torch.randperm(S, generator=draw)[:N] for _ in range(B * T * C)]).view(B, T, C, N)
    chosen[:, :, :, 7:] = torch.where(chosen[:, :, :, 7:] % 2 == 0, -1, chosen[:, :, :, 7:])
    return q, k, v, chosen


def defined(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, softmax: Softmax) -> Tensor:
    """Query by query, head by head."""
    o, G, C = q.new_zeros(B, T, H, V), k.shape[2], chosen.shape[2]
    for b, t, h in torch.cartesian_prod(torch.arange(B), torch.arange(T), torch.arange(H)).tolist():
        places = [s for s in chosen[b, t, h * C // H].tolist() if s >= 0]
        logits = (k[b, places, h * G // H] @ q[b, t, h]) * (K**-0.5 if softmax.scale is None else softmax.scale)
        if softmax.cap:
            logits = softmax.cap * torch.tanh(logits / softmax.cap)
        sink = 0 if softmax.sinks is None else softmax.sinks[h].exp()
        o[b, t, h] = (logits.exp() @ v[b, places, h * G // H]) / (logits.exp().sum() + sink)
    return o


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("G", "C"), [(8, 8), (2, 2), (2, 4), (1, 8), (1, 1)])
def test_is_its_definition(G, C, name):
    q, k, v, chosen = given(G, C)
    o, want = gathered_tokens(q, k, v, chosen, SETTINGS[name]), defined(q, k, v, chosen, SETTINGS[name])
    torch.testing.assert_close(o, want, rtol=1e-10, atol=1e-10)


def test_float32_is_near_float64():
    got, want = (gathered_tokens(*given(2, 4, d)) for d in (torch.float32, torch.float64))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_caches_lie_as_they_like():
    q, k, v, chosen = given(2, 4)
    want = gathered_tokens(q, k, v, chosen)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    wide = torch.cat([k, v], -1)
    torch.testing.assert_close(gathered_tokens(q, *turned, chosen), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gathered_tokens(q, wide[..., :K], wide[..., K:], chosen), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gathered_tokens(q, k.mT.contiguous().mT, v, chosen), want, rtol=1e-12, atol=1e-12)


def test_who_chooses_nothing_reads_nothing_and_none_is_not_read():
    q, k, v, chosen = given(2, 4)
    chosen[0, 1, 2] = -1
    k[:, 5], v[:, 5], chosen[chosen == 5] = math.nan, math.nan, -1
    o = gathered_tokens(q, k, v, chosen)
    assert o.isfinite().all() and not o[0, 1, 4:6].any()


def test_a_nan_that_is_read_is_seen_by_its_readers_alone():
    q, k, v, chosen = given(2, 4)
    k[0, 5, 0] = math.nan
    read = (chosen == 5).any(-1).repeat_interleave(2, -1)
    read[1], read[:, :, 4:] = False, False  # the other row, and heads of the other key head
    assert torch.equal(gathered_tokens(q, k, v, chosen).isnan().all(-1), read)
