"""Rules of choice against searches over lists, ties by the lower number, and counts that go on at any cut."""

from __future__ import annotations

import pytest
import torch

from slipstream.ops.choose import above, in_best_groups, up_to_mass, within_capacity
from slipstream.ops.route import best, dense, router_logits, weigh

T, E = 40, 8


def scores():
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("members", [1, 2])
def test_choice_is_among_the_best_groups(members):
    for row, kept in zip(scores(), in_best_groups(scores(), 4, 2, members)):
        strength = [sorted(pair.tolist())[-members:] for pair in row.view(4, 2)]
        groups = sorted(range(4), key=lambda g: -sum(strength[g]))[:2]
        want = [row[e].item() if e // 2 in groups else -torch.inf for e in range(E)]
        assert kept.tolist() == want


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("most", [1, 4, E])
def test_the_fewest_that_exceed_a_mass(mass, most):
    p = scores().softmax(-1)
    for row, chosen in zip(p, up_to_mass(p, mass, most).tolist()):
        order = sorted(range(E), key=lambda e: -row[e])
        n = next((n for n in range(1, most) if row[order[:n]].sum() > mass), most)
        assert chosen == order[:n] + [E] * (most - n)


def test_those_above_a_threshold_and_no_more_than_allowed():
    chosen = above(torch.tensor([[0.5, -1, 2, 0.0, 3], [-1, -2, -3, -4, -5]]), 0.0, 2)
    assert chosen.tolist() == [[4, 2], [5, 5]]


def counted(experts, n_experts, capacity, stretch):
    """Token by token."""
    kept = []
    for t, own in enumerate(experts):
        if t % stretch == 0:
            counts = [0] * n_experts
        kept.append([e if counts[e] < capacity else n_experts for e in own])
        counts = [n + (e in own) for e, n in enumerate(counts)]
    return kept, counts


@pytest.mark.parametrize("cut", [0, 1, 7, 10, 39, T])
@pytest.mark.parametrize("stretch", [1, 6, 10, 100])
def test_an_expert_takes_the_first_of_a_stretch_at_any_cut(cut, stretch):
    experts = best(scores(), 2)[None]
    first = (torch.arange(T) % stretch == 0)[None]
    counts, kept = torch.zeros(1, E, dtype=torch.long), []
    for piece in (slice(0, cut), slice(cut, T)):
        if piece.stop > piece.start:
            chosen, after = within_capacity(experts[:, piece], E, 2, first[:, piece], counts)
            counts, kept = after[:, -1], kept + chosen[0].tolist()
    want, last = counted(experts[0].tolist(), E, 2, stretch)
    assert kept == want and counts[0].tolist() == last


def test_the_idle_weigh_nothing_and_are_not_counted():
    logits, chosen = scores(), best(scores(), 3)
    idle = chosen >= 5
    p = logits.softmax(-1).gather(-1, chosen)
    torch.testing.assert_close(weigh(logits, chosen, "softmax", False, idle), p * ~idle)
    got = weigh(logits, chosen, "softmax", True, idle)
    torch.testing.assert_close(got.sum(-1), (~idle).any(-1).double())
    everything = torch.ones_like(idle)
    leaf = logits.clone().requires_grad_()
    weigh(leaf, chosen, "softmax", True, everything).sum().backward()
    assert not weigh(logits, chosen, "sigmoid", True, everything).any() and leaf.grad.isfinite().all()


def test_dense_weights_stand_at_their_expert():
    w = dense(torch.tensor([[0.25, 0.5, 9.0]]), torch.tensor([[3, 0, 7]]), 5)
    assert w.tolist() == [[0.5, 0, 0, 0.25, 0]]


def test_autocast_does_not_round_the_router():
    x, weight = torch.randn(50, 64), torch.randn(E, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got = router_logits(x, weight)
    torch.testing.assert_close(got, x @ weight.T)
