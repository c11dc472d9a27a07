"""Attention to summaries against the loop: stretches at any cut, outputs, gradients, the blocks their weights point at."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops import compressed_attention as ops
from slipstream.ops.compressed_attention import Stretch
from slipstream.ops.softmax import Softmax

B, T, H, G, K, V = 2, 31, 4, 2, 6, 5
NONE = torch.zeros(B, dtype=torch.long)
STRETCHES = [Stretch(4, 2), Stretch(4, 4), Stretch(6, 2), Stretch(1, 1)]


def lines(stretch):
    draw = torch.Generator().manual_seed(0)
    n = stretch.whole(T)
    shapes = ((T, H, K), (n, G, K), (n, G, V))
    return [torch.randn(B, *s, dtype=torch.float64, generator=draw, requires_grad=True) for s in shapes]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stretch", STRETCHES)
@pytest.mark.parametrize("queries", [5, 512])
def test_summaries_are_read_as_defined(stretch, queries, monkeypatch):
    monkeypatch.setattr(ops, "QUERIES", queries)
    args = lines(stretch)
    o, _ = ops.summaries_attention(*args, NONE, stretch)
    want, _ = ops.reference(*args, stretch)
    close(o, want)
    seed = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
    got, wanted = (torch.autograd.grad((y * seed).sum(), args) for y in (o, want))
    for a, b in zip(got, wanted):
        close(a, b)


@pytest.mark.parametrize("stretch", STRETCHES)
@pytest.mark.parametrize("cut", [(T,), (1,) * T, (3, 0, 9, 19)])
def test_every_stretch_is_handed_out_once_at_any_cut(stretch, cut):
    x = torch.randn(B, T, G, K, generator=torch.Generator().manual_seed(0))
    before, past, found = x.new_zeros(B, stretch.length - 1, G, K), NONE, []
    for piece in x.split(list(cut), 1):
        line = torch.cat([before, piece], 1)
        held, first, count = ops.stretches(line, past, stretch)
        assert first.tolist() == [len(found)] * B
        found += list(held[:, : int(count[0])].unbind(1))
        past, before = past + piece.shape[1], line[:, line.shape[1] - stretch.length + 1 :]
    assert len(found) == stretch.whole(T)
    for i, held in enumerate(found):
        assert torch.equal(held, x[:, i * stretch.stride : i * stretch.stride + stretch.length])


def test_rows_end_their_stretches_at_their_own_places():
    stretch, x = Stretch(4, 2), torch.randn(B, 20, G, K)
    past, lengths = torch.tensor([9, 2]), torch.tensor([5, 3])
    line = torch.stack([x[b, p : p + 8] for b, p in enumerate((past - 3).clamp(min=0).tolist())])
    line[1] = torch.cat([torch.zeros(1, G, K), x[1, :7]])
    held, first, count = ops.stretches(line, past, stretch, lengths)
    assert first.tolist() == [3, 0] and count.tolist() == [3, 1]
    assert torch.equal(held[0, :3], torch.stack([x[0, i : i + 4] for i in (6, 8, 10)]))
    assert torch.equal(held[1, 0], x[1, :4])


@pytest.mark.parametrize("stretch", STRETCHES)
@pytest.mark.parametrize("block_size", [4, 6, 12])
def test_blocks_gain_the_weights_of_what_they_share_with_summaries(stretch, block_size):
    if block_size % stretch.stride:
        block_size = stretch.stride
    (q, k, v), blocks, n = lines(stretch), -(-T // block_size), 4
    chosen = ops.rank(q, k, NONE, stretch, block_size, n)
    _, weights = ops.reference(q, k, v, stretch)
    scores = torch.zeros(B, T, G, blocks, dtype=torch.float64)
    for i in range(k.shape[1]):
        for begin in range(i * stretch.stride, i * stretch.stride + stretch.length, stretch.stride):
            scores[..., begin // block_size] += weights[..., i].unflatten(2, (G, -1)).sum(3)
    for b, t, g in torch.cartesian_prod(torch.arange(B), torch.arange(T), torch.arange(G)).tolist():
        own = t // block_size
        always = sorted({0, max(own - 1, 0), own})
        rest = [j for j in range(own) if j not in always]
        rest = sorted(rest, key=lambda j: -scores[b, t, g, j])[: n - len(always)]
        want = sorted(always + rest)
        assert chosen[b, t, g].tolist() == want + [-1] * (n - len(want))


WINDOW, EVERY = 6, 3
SINKS = Softmax(sinks=torch.linspace(-1, 1, H, dtype=torch.float64))


def shared_keys():
    draw = torch.Generator().manual_seed(0)
    shapes = ((T, H, K), (T, 1, K), (T // EVERY, 1, K))
    return [torch.randn(B, *s, dtype=torch.float64, generator=draw, requires_grad=True) for s in shapes]


def token_by_token(q, keys, summaries, chosen):
    outputs = []
    for b, t in torch.cartesian_prod(torch.arange(B), torch.arange(T)).tolist():
        far = range((t + 1) // EVERY) if chosen is None else [i for i in chosen[b, t, 0].tolist() if i >= 0]
        seen = torch.cat([keys[b, max(0, t + 1 - WINDOW) : t + 1, 0], summaries[b, list(far), 0]])
        logits = torch.cat([q[b, t] @ seen.T / K**0.5, SINKS.sinks[:, None]], 1)
        outputs.append(logits.softmax(1)[:, :-1] @ seen)
    return torch.stack(outputs).unflatten(0, (B, T))


def few(n):
    draw = torch.rand(B, T, 1, T // EVERY, generator=torch.Generator().manual_seed(1))
    return ops.choose(draw, (torch.arange(T // EVERY) < (torch.arange(1, T + 1) // EVERY)[:, None])[None, :, None], n)


@pytest.mark.parametrize("together", [1, 7, 64])
@pytest.mark.parametrize("n", [None, 2, 20])
def test_a_window_and_summaries_are_one_softmax(n, together, monkeypatch):
    monkeypatch.setattr(ops, "TOGETHER", together)
    q, keys, summaries = args = shared_keys()
    chosen = None if n is None else few(n)
    line = torch.cat([keys.new_zeros(B, WINDOW - 1, 1, K), keys], 1)
    o = ops.window_and_summaries(q, line, summaries, NONE, WINDOW, EVERY, chosen, SINKS)
    want = token_by_token(*args, chosen)
    close(o, want)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), args) for y in (o, want))):
        close(a, b)
    if n == 20:
        close(o, ops.window_and_summaries(q, line, summaries, NONE, WINDOW, EVERY, None, SINKS))


def test_a_window_and_summaries_go_on_from_pasts_of_their_own():
    q, keys, summaries = (x.detach() for x in shared_keys())
    want, past = token_by_token(q, keys, summaries, few(2)), torch.tensor([20, 9])
    at, row = past[:, None] + torch.arange(4), torch.arange(B)[:, None]
    line = keys[row, past[:, None] + torch.arange(1 - WINDOW, 4)]
    close(
        ops.window_and_summaries(q[row, at], line, summaries, past, WINDOW, EVERY, few(2)[row, at], SINKS),
        want[row, at],
    )


def test_cost_is_what_is_declared():
    q, keys, summaries = (x.detach() for x in shared_keys())
    line = torch.cat([keys.new_zeros(B, WINDOW - 1, 1, K), keys], 1)
    with FlopCounterMode(display=False) as counter:
        ops.window_and_summaries(q, line, summaries, NONE, WINDOW, EVERY, None, SINKS)
    assert counter.get_total_flops() == ops.window_and_summaries_flops(T, B, H, K, WINDOW, EVERY, "forward")
    q, k, v = (x.detach() for x in lines(Stretch(4, 2)))
    with FlopCounterMode(display=False) as counter:
        ops.summaries_attention(q, k, v, NONE, Stretch(4, 2))
        ops.rank(q, k, NONE, Stretch(4, 2), 4, 3)
    declared = [ops.summaries_flops(T, B, H, K, width, Stretch(4, 2), "forward") for width in (V, 0)]
    assert counter.get_total_flops() == sum(declared)
