"""Attention by content and distance against its definition: outputs, all gradients, cuts, pasts of their own, flops."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.index_sets import Segments
from slipstream.ops.relative_attention import reference, relative_attention, relative_attention_flops

B, T, H, K, P = 2, 29, 3, 4, 5


def inputs(segments: Segments):
    draw = torch.Generator().manual_seed(0)
    span = segments.size * (segments.back + 1)
    dims = {"q": (B, T, H, K), "p": (B, T, H, P), "k": (B, T, H, K), "v": (B, T, H, 2), "r": (H, P, span)}
    return {n: torch.randn(*d, dtype=torch.float64, generator=draw).requires_grad_() for n, d in dims.items()}


def close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("segments", [Segments(5, 1), Segments(4, 0), Segments(8, 2), Segments(64, 1)])
def test_it_is_its_definition_and_so_are_its_gradients(segments):
    leaves, fresh = inputs(segments), torch.zeros(B, dtype=torch.long)
    outputs = (
        relative_attention(**leaves, segments=segments, past=fresh, first=fresh),
        reference(**leaves, segments=segments),
    )
    close(*([o, *torch.autograd.grad(o.square().sum(), list(leaves.values()))] for o in outputs))


@pytest.mark.parametrize("tokens", [1, 7])
def test_rows_go_on_from_pasts_of_their_own(tokens):
    segments, past = Segments(5, 1), torch.tensor([3, 17])
    leaves, first = inputs(segments), torch.zeros(B, dtype=torch.long)
    want = reference(**leaves, segments=segments)
    rows = (torch.arange(B)[:, None], past[:, None] + torch.arange(tokens))
    new = {n: leaves[n][rows] for n in "qp"} | {n: leaves[n] for n in "kvr"}
    close([relative_attention(**new, segments=segments, past=past, first=first)], [want[rows]])


def test_declared_flops_are_counted():
    segments = Segments(5, 1)
    leaves, fresh = inputs(segments), torch.zeros(B, dtype=torch.long)
    leaves["v"] = leaves["k"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        relative_attention(**leaves, segments=segments, past=fresh, first=fresh)
    assert counter.get_total_flops() == relative_attention_flops(T, B, H, K, P, segments)
