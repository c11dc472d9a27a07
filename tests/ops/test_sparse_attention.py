"""Attention over every index set against the query-by-query definition: outputs, gradients, cuts, ragged pasts, memory."""

from __future__ import annotations

import pytest
import torch
from test_index_sets import SETS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slipstream.laws.cost import COUNTED
from slipstream.ops.index_sets import Global, Strided, Window
from slipstream.ops.index_tiles import pairs
from slipstream.ops.softmax import Softmax, merge, read
from slipstream.ops.sparse_attention import read_set, reference, sparse_attention, sparse_attention_flops

B, T, H, G, K, V = 2, 41, 4, 2, 6, 3
FRESH = torch.zeros(B, dtype=torch.long)


def lines(tokens: int = T, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    dims = ((H, K), (G, K), (G, V))
    return [torch.randn(B, tokens, *d, dtype=dtype, generator=draw).requires_grad_() for d in dims]


def close(got, want, tol: float = 1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def with_gradients(o: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    return [o, *torch.autograd.grad(o, leaves, weights)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", SETS)
def test_every_set_is_its_definition_and_so_are_its_gradients(name: str, causal: bool):
    leaves = lines()
    got = with_gradients(sparse_attention(*leaves, SETS[name], FRESH, causal=causal), leaves)
    close(got, with_gradients(reference(*leaves, SETS[name], causal), leaves))


@pytest.mark.parametrize("name", SETS)
def test_rows_go_on_from_pasts_of_their_own(name: str):
    leaves = lines()
    for past, tokens in ((torch.tensor([3, 17]), 20), (torch.tensor([40, 0]), 1), (torch.tensor([8, 8]), 33)):
        rows = (torch.arange(B)[:, None], past[:, None] + torch.arange(tokens))
        got = sparse_attention(leaves[0][rows], *leaves[1:], SETS[name], past)
        close(with_gradients(got, leaves), with_gradients(reference(*leaves, SETS[name])[rows], leaves))


SINKS = torch.tensor([0.5, -3.0, 0.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("settings", [Softmax(scale=0.3), Softmax(cap=1.5), Softmax(sinks=SINKS)])
def test_how_logits_become_weights_is_passed_on(settings: Softmax):
    q, k, v = lines()
    index_set = Global(2) | Window(4) | Window(3, dilation=5)
    t, s = torch.arange(T)[:, None], torch.arange(T)
    want = read(q, k, v, (index_set.sees(t, s) & (s <= t))[None, None], settings)
    leaves = [q, k, v]
    close(
        with_gradients(sparse_attention(q, k, v, index_set, FRESH, softmax=settings), leaves),
        with_gradients(want, leaves),
    )


def test_sets_that_share_pairs_are_merged_with_multiplicity():
    """Parts given apart count a pair once each: the logarithms of their denominators are exact."""
    leaves = lines()
    parts = [read_set(*leaves, index_set, FRESH) for index_set in (Window(9), SETS["dilated"])]
    t, s = torch.arange(T)[:, None], torch.arange(T)
    times = sum((x.sees(t, s) & (s <= t)).double() for x in (Window(9), SETS["dilated"]))
    k, v = (x.repeat_interleave(H // G, 2) for x in leaves[1:])
    weights = torch.einsum("bthk,bshk->bhts", leaves[0], k).div(K**0.5).exp() * times
    want = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
    close(with_gradients(merge(parts)[0], leaves), with_gradients(want, leaves))


def test_a_line_may_hold_only_what_is_still_seen():
    """The first two tokens at their places, then the last eight and the new ones."""
    (q, k, v), index_set, past = lines(), Global(2) | Window(9), torch.tensor([12, 20])
    want, tokens, row = reference(*lines(), index_set), 7, torch.arange(B)[:, None]
    here = past[:, None] + torch.arange(tokens)
    place = torch.cat([torch.arange(2).expand(B, 2), past[:, None] - 8 + torch.arange(8 + tokens)], 1)
    got = sparse_attention(q[row, here], k[row, place], v[row, place], index_set, past, first=past - 8, kept=2)
    close([got], [want[row, here]])


def test_ragged_rows_see_to_their_own_ends_where_the_future_is_seen():
    (q, k, v), lengths = lines(), torch.tensor([T, 13])
    got = sparse_attention(q, k, v, SETS["bigbird"], FRESH, lengths=lengths, causal=False)
    for b, n in enumerate(lengths.tolist()):
        row = [x[b : b + 1, :n] for x in (q, k, v)]
        close([got[b : b + 1, :n]], [reference(*row, SETS["bigbird"], causal=False)])


def test_nothing_is_read_of_nothing():
    q, k, v = lines()
    assert sparse_attention(q[:, :0], k, v, SETS["a-shape"], FRESH).shape == (B, 0, H, V)
    assert sparse_attention(q[:0], k[:0], v[:0], SETS["a-shape"], FRESH[:0]).shape == (0, T, H, V)


@pytest.mark.parametrize("name", SETS)
def test_declared_flops_are_counted(name: str):
    q, k, _ = (x.detach() for x in lines())
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        sparse_attention(q, k, k, SETS[name], FRESH)
    assert counter.get_total_flops() == sparse_attention_flops(T, B, H, K, SETS[name], "forward")


@pytest.mark.parametrize("name", ["a-shape", "strided pattern", "bigbird", "two dilations"])
def test_memory_is_linear_in_length(name: str):
    """What the gradient keeps is the lines; no step on the way is as large as a fiftieth of all pairs."""
    tokens, largest, kept = 8192, 0, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, t.numel()) if isinstance(t, Tensor) else largest
            return out

    def keep(t: Tensor) -> Tensor:
        nonlocal kept
        kept += t.numel()
        return t

    q, k, v = (x[:1] for x in lines(tokens, torch.float32))
    index_set = Window(90) | Strided(90) if name == "strided pattern" else SETS[name]
    with Watch():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            o = sparse_attention(q, k, v, index_set, FRESH[:1])
        o.sum().backward()
    assert pairs(index_set, tokens) < tokens**2 / 4
    assert kept < 40 * tokens * (H + 2 * G) and largest < tokens**2 / 50
