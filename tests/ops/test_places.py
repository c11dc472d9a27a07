"""cut_out: tokens of each row from a place of its own on."""

from __future__ import annotations

import torch

from slipstream.ops.places import cut_out


def test_what_lies_outside_a_row_is_zero():
    x = torch.arange(1.0, 9.0).reshape(2, 4)
    got = cut_out(x, torch.tensor([-1, 2]), 6)
    assert got.tolist() == [[0, 1, 2, 3, 4, 0], [7, 8, 0, 0, 0, 0]]


def test_it_goes_back_and_forth():
    x, place = torch.randn(3, 5, 2, 4), torch.tensor([0, 3, 7])
    assert torch.equal(cut_out(cut_out(x, -place, 12), place, 5), x)


def test_an_empty_row_gives_zeros():
    assert torch.equal(cut_out(torch.zeros(2, 0, 3), torch.tensor([0, 1]), 2), torch.zeros(2, 2, 3))
