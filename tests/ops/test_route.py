"""Routing: the same products as choice by choice, in work and memory of what was chosen alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.dispatch import torch_forms
from slipstream.ops.expert_linear import reference
from slipstream.ops.route import Gathered, best, group, route_flops, router_logits, weigh

T, E, K, I, O = 13, 5, 2, 6, 4


def made(*batch, n_experts=E, k=K):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*batch, I, dtype=torch.float64, generator=draw)
    logits = torch.randn(*batch, n_experts, dtype=torch.float64, generator=draw)
    weight = torch.randn(n_experts, O, I, dtype=torch.float64, generator=draw)
    return x, logits, best(logits, k), weight


def ways(experts, n_experts=E):
    return [group(experts, n_experts), Gathered(experts)]


@pytest.mark.parametrize("batch", [(T,), (3, T), (2, 0), (0,)])
@pytest.mark.parametrize("way", [0, 1], ids=["grouped", "gathered"])
def test_products_are_those_of_each_choice(batch, way):
    x, logits, experts, weight = made(*batch)
    w = weigh(logits, experts, "softmax", normalised=True)[..., None]
    way = ways(experts)[way]
    spread = x[..., None, :].expand(*batch, K, I)
    want = reference(spread, weight, experts)
    torch.testing.assert_close(way.back(way.project(way.send(x), weight)), want)
    torch.testing.assert_close(way.combine(way.each(w * spread), weight), (w * want).sum(-2))
    torch.testing.assert_close(way.back(way.each(spread)), spread)


@pytest.mark.parametrize("way", [0, 1], ids=["grouped", "gathered"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_gradients_reach_tokens_gates_and_experts(way, gate):
    x, logits, experts, weight = made(3, T)
    out = torch.randn(E, I, O, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def mixture(of, x, logits, w_in, w_out):
        """Experts of two layers; of: a way, or the definition."""
        w = weigh(logits, experts, gate, normalised=True)[..., None]
        if of is not None:
            h = of.project(of.send(x), w_in).relu()
            return of.combine(of.each(w) * h, w_out)
        h = reference(x[..., None, :].expand(3, T, K, I), w_in, experts).relu()
        return (w * reference(h, w_out, experts)).sum(-2)

    leaves = [t.clone().requires_grad_() for t in (x, logits, weight, out)]
    got, want = mixture(ways(experts)[way], *leaves), mixture(None, *leaves)
    torch.testing.assert_close(got, want)
    probe = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((y * probe).sum(), leaves) for y in (got, want))):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_equal_scores_go_to_the_lower_number():
    assert best(torch.zeros(2, 100), 3).tolist() == [[0, 1, 2]] * 2
    assert best(torch.tensor([1.0, 5.0, 2.0, 5.0, 5.0]), 4).tolist() == [1, 3, 4, 2]


def test_weights_are_softmax_or_sigmoid_normalised_or_not():
    _, logits, experts, _ = made(T)
    softmax, sigmoid = (t.gather(-1, experts) for t in (logits.softmax(-1), logits.sigmoid()))
    torch.testing.assert_close(weigh(logits, experts, "softmax", normalised=False), softmax)
    torch.testing.assert_close(weigh(logits, experts, "sigmoid", normalised=False), sigmoid)
    for gate, own in (("softmax", softmax), ("sigmoid", sigmoid)):
        torch.testing.assert_close(weigh(logits, experts, gate, normalised=True), own / own.sum(-1, keepdim=True))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_weights_survive_logits_of_any_size(gate):
    logits = torch.tensor([[-1e4, -1.1e4, -1.2e4, 1e4], [-1e4, -1e4, -1e4, -1e4]], requires_grad=True)
    chosen = torch.tensor([[0, 1], [0, 1]])
    w = weigh(logits, chosen, gate, normalised=True)
    w[:, 0].sum().backward()
    torch.testing.assert_close(w, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    assert logits.grad.isfinite().all()


def test_logits_are_not_rounded_to_the_activations():
    x, weight = torch.randn(50, 64).bfloat16(), torch.randn(E, 64).bfloat16()
    torch.testing.assert_close(router_logits(x, weight), x.float() @ weight.float().T)


def test_nobody_is_dropped_and_experts_without_tokens_get_no_gradient():
    x, _, _, weight = made(T)
    experts = torch.tensor([[3, 1]]).expand(T, K)
    way, w = group(experts, E), weight.clone().requires_grad_()
    assert way.counts == [0, T, 0, T, 0]
    y = way.combine(way.send(x), w)
    torch.testing.assert_close(y, x @ (weight[3] + weight[1]).T)
    y.sum().backward()
    assert [bool(g.any()) for g in w.grad] == [False, True, False, True, False]


def test_a_token_is_served_alike_whoever_stands_beside_it():
    x, _, experts, weight = made(3, T)
    whole = group(experts, E)
    alone = group(experts[1:2], E)
    torch.testing.assert_close(
        whole.back(whole.project(whole.send(x), weight))[1:2], alone.back(alone.project(alone.send(x[1:2]), weight))
    )


@pytest.mark.parametrize("way", [0, 1], ids=["grouped", "gathered"])
def test_work_is_that_of_the_chosen(way):
    x, _, experts, weight = made(3, T, n_experts=40)
    way = ways(experts, 40)[way]
    with FlopCounterMode(display=False) as counter, torch_forms():
        h = way.project(way.send(x), weight)
        way.combine(h, weight.mT)
    assert counter.get_total_flops() == 2 * route_flops(3 * T * K, I, O)


def test_what_is_kept_for_the_gradient_does_not_grow_with_the_number_of_experts():
    kept = []
    for n_experts in (4, 64):
        x, _, experts, weight = made(500, n_experts=n_experts)
        sizes = {}

        def note(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        way = group(experts, n_experts)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            h = way.project(way.send(x.requires_grad_()), weight.requires_grad_())
            way.combine(h, weight.mT)
        kept.append(sum(sizes.values()) - weight.nbytes)
    assert kept[1] < 1.1 * kept[0]
