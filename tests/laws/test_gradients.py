"""Gradients are those of the printed equation, also through a state that is handed over; the future reaches no output."""

from __future__ import annotations

import pytest
import torch

from .conftest import B, T, close


def gradients(f, x, mixer, w):
    mixer.zero_grad()
    leaf = x.clone().requires_grad_()
    (f(leaf) * w).sum().backward()
    return {"x": leaf.grad} | {n: p.grad.clone() if p.grad is not None else None for n, p in mixer.named_parameters()}


def test_gradients_are_those_of_the_equation(mixer, x):
    w = torch.randn_like(x)
    got, want = gradients(mixer.forward, x, mixer, w), gradients(mixer.reference, x, mixer, w)
    for name in want:
        assert got[name] is not None, f"{name} gets no gradient"
        close(got[name], want[name])


def test_gradients_flow_through_the_state(mixer, x):
    w = torch.randn_like(x)

    def in_two(leaf):
        y, state = mixer.prefill(leaf[:, :9], mixer.init_state(B, T))
        return torch.cat([y, mixer.prefill(leaf[:, 9:], state)[0]], 1)

    got, want = gradients(in_two, x, mixer, w), gradients(mixer.forward, x, mixer, w)
    for name in want:
        close(got[name], want[name])


def test_gradients_flow_through_steps(mixer, x):
    w = torch.randn_like(x)

    def steps(leaf):
        state, ys = mixer.init_state(B, T), []
        for t in range(T):
            y, state = mixer.step(leaf[:, t : t + 1], state)
            ys.append(y)
        return torch.cat(ys, 1)

    got, want = gradients(steps, x, mixer, w), gradients(mixer.forward, x, mixer, w)
    for name in want:
        close(got[name], want[name])


@pytest.mark.parametrize("t", [1, 11, T - 1])
def test_the_future_cannot_reach_the_past(mixer, x, t):
    x.requires_grad_()
    (grad,) = torch.autograd.grad(mixer(x)[:, :t].sum(), x)
    assert grad[:, t:].abs().max() <= 1e-12 * grad.abs().max()
    assert grad[:, t - 1].abs().max() > 0  # and the probe itself is alive
