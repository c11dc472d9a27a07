"""Balance: one where all is even, more where it is not; a bias that follows the load."""

from __future__ import annotations

import torch

from slipstream.ops.balance import balance_loss, moved_bias, probabilities, z_loss


def test_the_balance_loss_is_one_where_all_is_even_and_e_where_one_takes_all():
    even, one = torch.full((10, 4), 0.25), torch.eye(4)[0].expand(10, 4)
    torch.testing.assert_close(balance_loss(even, torch.tensor([5, 5, 5, 5])), torch.tensor(1.0))
    torch.testing.assert_close(balance_loss(one, torch.tensor([20, 0, 0, 0])), torch.tensor(4.0))


def test_its_gradient_moves_scores_from_the_busy_to_the_idle():
    logits = torch.zeros(10, 4, requires_grad=True)
    balance_loss(logits.softmax(-1), torch.tensor([20, 10, 5, 5])).backward()
    slope = logits.grad.sum(0)
    assert slope[0] > slope[1] > slope[2] == slope[3]


def test_the_z_loss_is_the_mean_square_of_the_log_of_the_sum():
    logits = torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(z_loss(logits), logits.exp().sum(-1).log().square().mean())


def test_probabilities_of_either_gate_sum_to_one():
    logits = torch.tensor([[-500.0, 3.0, 500.0], [-500.0, -500.0, -500.0]])
    for gate in ("softmax", "sigmoid"):
        torch.testing.assert_close(probabilities(logits, gate).sum(-1), torch.ones(2))
    own = logits[:, 1:].sigmoid()
    torch.testing.assert_close(probabilities(logits, "sigmoid")[0, 1:], own[0] / own[0].sum())


def test_the_bias_rises_for_the_idle_and_falls_for_the_busy():
    bias = moved_bias(torch.zeros(4), torch.tensor([7, 1, 4, 4]), 0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
