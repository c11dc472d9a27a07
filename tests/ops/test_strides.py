"""Every r-th token taken out and put back, for each head others, however a sequence is cut."""

from __future__ import annotations

import pytest
import torch

from slipstream.ops.strides import Strides, n_taken

T, G, R = 11, 3, 2


@pytest.mark.parametrize("rate", [1, 2, 4, 16])
def test_each_head_group_takes_its_own_positions_and_gets_them_back(rate):
    past, lengths = torch.tensor([0, 5, 9]), torch.tensor([11, 0, 7])
    x = torch.randn(3, T, G * R, 2, dtype=torch.float64)
    strides = Strides(rate, G, past, T, lengths)
    rows = strides.out_of(x)
    assert rows.shape == (3 * G, n_taken(T, rate), R, 2)
    back = strides.back(rows, -1.0)
    for b, (p, n) in enumerate(zip(past.tolist(), lengths.tolist())):
        for j in range(G):
            mine = [t for t in range(n) if (p + t) % rate == j % rate]
            row, heads = b * G + j, slice(j * R, (j + 1) * R)
            assert strides.lengths[row] == len(mine)
            assert strides.past[row] == sum(s % rate == j % rate for s in range(p))
            torch.testing.assert_close(rows[row, : len(mine)], x[b, mine, heads])
            assert not rows[row, len(mine) :].any()
            torch.testing.assert_close(back[b, mine, heads], x[b, mine, heads])
            others = [t for t in range(n) if t not in mine]
            assert (back[b, others, heads] == -1).all()


def test_no_tokens_give_no_rows_and_padding_is_not_taken():
    nothing = Strides(4, G, torch.tensor([3]), 0, None)
    assert nothing.out_of(torch.zeros(1, 0, G, 2)).shape == (G, 0, 1, 2)
    x = torch.full((1, T, G, 2), torch.nan)
    assert not Strides(2, G, torch.tensor([3]), T, torch.tensor([0])).out_of(x).any()
