"""Networks trained as they read: the dual form against the printed rule, whose inner gradient torch takes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops import inner_sgd as ops
from slipstream.ops import swiglu_sgd as swiglu
from slipstream.ops.mini_batches import MiniBatches

B, T, H, K, M = 3, 11, 2, 4, 4
SHAPES = {"linear": [(K, K)], "mlp": [(K, 6), (6, 5), (5, K)]}


def close(a, b, tol=1e-11):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def draw(layers, bias, dtype=torch.float64):
    """q, k, v, lr, the rates of both rules, and a network."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=dtype, generator=generator)

    q, k, v = (normal(B, T, H, K).requires_grad_() for _ in range(3))
    lr = (0.3 * normal(B, T, H).sigmoid()).requires_grad_()
    logs = [(-normal(B, T, H).exp()).requires_grad_() for _ in range(2)]
    pace = (1 / torch.arange(1, M + 1, dtype=dtype) + 0.1 * normal(M).abs()).requires_grad_()
    weights = tuple((0.5 * normal(H, i + bias, o)).requires_grad_() for i, o in SHAPES[layers])
    net = ops.Net(weights, (1 + 0.3 * normal(H, K)).requires_grad_(), (0.3 * normal(H, K)).requires_grad_(), bias, 0.01)
    return (q, k, v, lr), pace, logs, net


def zeros(net, rows, kinds):
    return tuple(tuple(w.new_zeros(rows, *w.shape) for w in net.weights) for _ in range(kinds))


class Averaged:
    kinds = 2

    def __init__(self, pace, logs):
        self.leaves = [pace]

    def run(self, x, net, state, position, lengths=None):
        return ops.averaged_sgd(*x[:4], *self.leaves, net, state, position, lengths)

    def step(self, x, net, state, position):
        return ops.averaged_step(*x[:4], *self.leaves, net, state, position)

    def reference(self, x, net):
        return ops.averaged_reference(*x[:4], *self.leaves, net)


class Momentum:
    kinds = 3

    def __init__(self, pace, logs):
        self.leaves = logs

    def run(self, x, net, state, position, lengths=None):
        return ops.momentum_sgd(*x, M, net, state, position, lengths)

    def step(self, x, net, state, position):
        return ops.momentum_step(*x, M, net, state, position)

    def reference(self, x, net):
        return ops.momentum_reference(*x, M, net)


@pytest.fixture(params=[(r, n, b) for r in (Averaged, Momentum) for n in SHAPES for b in (True, False)], ids=str)
def case(request):
    rule, layers, bias = request.param
    line, pace, logs, net = draw(layers, bias)
    return rule(pace, logs), [*line, *logs], net


def test_it_is_the_rule_with_all_gradients(case):
    rule, x, net = case
    start = torch.zeros(B, dtype=torch.long)
    got, want = rule.run(x, net, zeros(net, B, rule.kinds), start)[0], rule.reference(x, net)
    close(got, want)
    leaves = [*x[:4], *rule.leaves, *net.weights, net.norm_weight, net.norm_bias]
    w = torch.randn_like(want)
    for g, g_want in zip(*(torch.autograd.grad((o * w).sum(), leaves) for o in (got, want))):
        close(g, g_want, 1e-9)


@pytest.mark.parametrize("cut", [(3, 8), (4, 7), (0, 11), (6, 0, 5), (1,) * 11], ids=str)
def test_any_cut_is_the_whole(case, cut):
    rule, x, net = case
    want, end = rule.run(x, net, zeros(net, B, rule.kinds), torch.zeros(B, dtype=torch.long))
    state, at, ys = zeros(net, B, rule.kinds), 0, []
    for n in cut:
        y, state = rule.run([t[:, at : at + n] for t in x], net, state, torch.full((B,), at))
        ys.append(y)
        at += n
    close(torch.cat(ys, 1), want)
    for got, w in zip(sum(state, ()), sum(end, ())):
        close(got, w)


def test_steps_are_the_whole(case):
    rule, x, net = case
    want, end = rule.run(x, net, zeros(net, B, rule.kinds), torch.zeros(B, dtype=torch.long))
    state = zeros(net, B, rule.kinds)
    for t in range(T):
        y, state = rule.step([u[:, t : t + 1] for u in x], net, state, torch.full((B,), t))
        close(y, want[:, t : t + 1])
    for got, w in zip(sum(state, ()), sum(end, ())):
        close(got, w)


def test_rows_of_any_past_and_length_keep_to_their_own_borders(case):
    """Row b has read `past` tokens, then reads `more` of a padded call, then all go on together."""
    rule, x, net = case
    past, more, last = [0, 3, 5], [6, 0, 5], 1
    rows = []
    for b, n in enumerate(past):
        start = torch.zeros(1, dtype=torch.long)
        rows.append(rule.run([t[b : b + 1, :n] for t in x], net, zeros(net, 1, rule.kinds), start)[1])
    state = tuple(tuple(torch.cat(parts) for parts in zip(*(row[kind] for row in rows))) for kind in range(rule.kinds))
    piece = [torch.stack([t[b, n : n + 6] for b, n in enumerate(past)]).detach() for t in x]
    for t in piece:
        for b, n in enumerate(more):
            t[b, n:] = torch.nan
    position, lengths = torch.tensor(past), torch.tensor(more)
    y, state = rule.run(piece, net, state, position, lengths)
    after = [torch.stack([t[b, n + m : n + m + last] for b, (n, m) in enumerate(zip(past, more))]) for t in x]
    z, _ = rule.run(after, net, state, position + lengths)
    for b, (n, m) in enumerate(zip(past, more)):
        alone = rule.reference([t[b : b + 1, : n + m + last] for t in x], net)
        close(y[b, :m], alone[0, n : n + m])
        close(z[b], alone[0, n + m :])


def test_flops_are_those_torch_counts(case):
    rule, x, net = case
    shapes = [tuple(w.shape[1:]) for w in net.weights]
    momentum = rule.kinds == 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rule.run(x, net, zeros(net, B, rule.kinds), torch.zeros(B, dtype=torch.long))
    assert counter.get_total_flops() == ops.inner_sgd_flops(T, B, H, shapes, net.bias, M, momentum, "forward")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rule.step([u[:, :1] for u in x], net, zeros(net, B, rule.kinds), torch.zeros(B, dtype=torch.long))
    assert counter.get_total_flops() == ops.inner_sgd_flops(T, B, H, shapes, net.bias, M, momentum, "step")


def test_no_tokens_leave_the_state(case):
    rule, x, net = case
    position = torch.tensor([2, 0, 5])
    _, before = rule.run(x, net, zeros(net, B, rule.kinds), position)
    y, after = rule.run([t[:, :0] for t in x], net, before, position + T)
    assert y.shape == (B, 0, H, K)
    assert all(torch.equal(a, b) for a, b in zip(sum(after, ()), sum(before, ())))


def test_more_mini_batches_than_a_segment_change_nothing(case, monkeypatch):
    rule, x, net = case
    start = torch.zeros(B, dtype=torch.long)
    want = rule.run(x, net, zeros(net, B, rule.kinds), start)[0]
    g_want = torch.autograd.grad(want.square().sum(), x[:4])
    monkeypatch.setattr(ops, "SEGMENT", 1)
    got = rule.run(x, net, zeros(net, B, rule.kinds), start)[0]
    close(got, want)
    for g, w in zip(torch.autograd.grad(got.square().sum(), x[:4]), g_want):
        close(g, w)


def test_slots_stand_where_their_positions_say():
    x = torch.arange(1.0, 7.0).reshape(1, 6).repeat(2, 1)
    at = MiniBatches(torch.tensor([1, 6]), 6, 4, torch.tensor([6, 3]))
    assert at.lay(x)[:, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 0]]
    assert at.lay(x)[:, 1].tolist() == [[0, 0, 1, 2], [3, 0, 0, 0]]
    assert at.full.tolist() == [[True, True], [False, False]]
    assert at.last[0].tolist() == [3, 3]
    assert at.last[1].tolist() == [2, 0]
    assert at.in_order(at.by_head(x[..., None, None]))[0, :, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]


def draw_chunks():
    """What swiglu_sgd takes before its chunk size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q, k, v = (normal(B, T, H, K).requires_grad_() for _ in range(3))
    lr, momentum = normal(B, T, H, 3).sigmoid().requires_grad_(), normal(B, T, H).sigmoid().requires_grad_()
    start = tuple(normal(H, *shape).requires_grad_() for shape in ((K, 6), (6, K), (K, 6)))
    return [q, k, v, lr, momentum], start


def fresh_chunks(start, rows):
    def zeros():
        return tuple(w.new_zeros(rows, *w.shape) for w in start)

    return swiglu.ChunkState(zeros(), zeros(), zeros(), start[0].new_zeros(rows, H))


@pytest.mark.parametrize("muon", [False, True])
def test_chunks_are_the_rule_with_all_gradients(muon):
    x, start = draw_chunks()
    none = torch.zeros(B, dtype=torch.long)
    got = swiglu.swiglu_sgd(*x, start, M, muon, fresh_chunks(start, B), none)[0]
    want = swiglu.reference(*x, start, M, muon)
    close(got, want)
    w = torch.randn_like(want)
    for g, g_want in zip(*(torch.autograd.grad((o * w).sum(), [*x, *start]) for o in (got, want))):
        close(g, g_want, 1e-9)


@pytest.mark.parametrize("muon", [False, True])
def test_chunks_keep_to_each_rows_own_borders(muon):
    """Steps bring each row to a past of its own; a ragged call full of NaN and a last one go on from there."""
    x, start = draw_chunks()
    past, more, last = [0, 3, 5], [6, 0, 5], 1
    rows = []
    for b, n in enumerate(past):
        state = fresh_chunks(start, 1)
        for t in range(n):
            line = [u[b : b + 1, t : t + 1] for u in x]
            state = swiglu.swiglu_step(*line, start, M, muon, state, torch.tensor([t]))[1]
        rows.append(state)
    parts = [tuple(torch.cat(t) for t in zip(*(r[i] for r in rows))) for i in range(3)]
    state = swiglu.ChunkState(*parts, torch.cat([r.gates for r in rows]))
    piece = [torch.stack([t[b, n : n + 6] for b, n in enumerate(past)]).detach() for t in x]
    for t in piece:
        for b, n in enumerate(more):
            t[b, n:] = torch.nan
    position, lengths = torch.tensor(past), torch.tensor(more)
    y, state = swiglu.swiglu_sgd(*piece, start, M, muon, state, position, lengths)
    after = [torch.stack([t[b, n + m : n + m + last] for b, (n, m) in enumerate(zip(past, more))]) for t in x]
    z, _ = swiglu.swiglu_sgd(*after, start, M, muon, state, position + lengths)
    for b, (n, m) in enumerate(zip(past, more)):
        alone = swiglu.reference(*(t[b : b + 1, : n + m + last] for t in x), start, M, muon)
        close(y[b, :m], alone[0, n : n + m])
        close(z[b], alone[0, n + m :])


@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4)], ids=str)
def test_orthogonalised_keeps_directions_and_evens_lengths(shape):
    G = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A, _, B_t = torch.linalg.svd(G, full_matrices=False)
    evened = A.mT @ swiglu.orthogonalised(G) @ B_t.mT
    lengths = evened.diagonal(dim1=-2, dim2=-1)
    close(evened, torch.diag_embed(lengths))
    assert 0.6 < lengths.min() < lengths.max() < 1.3


@pytest.mark.parametrize("muon", [False, True])
def test_flops_of_chunks_are_those_torch_counts(muon):
    x, start = draw_chunks()
    none = torch.zeros(B, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        swiglu.swiglu_sgd(*x, start, M, muon, fresh_chunks(start, B), none)
    assert counter.get_total_flops() == swiglu.swiglu_flops(T, B, H, K, 6, M, muon, "forward")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        swiglu.swiglu_step(*(u[:, :1] for u in x), start, M, muon, fresh_chunks(start, B), none)
    assert counter.get_total_flops() == swiglu.swiglu_flops(T, B, H, K, 6, M, muon, "step")
