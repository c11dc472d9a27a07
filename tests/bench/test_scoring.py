"""Wilson's interval against published values; exact, near and absent on answers made up for the purpose."""

from __future__ import annotations

import pytest
import torch

from slipstream.bench.scoring import Score, score, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes_table(hits, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_never_leaves_the_unit_interval():
    for hits, n in ((0, 1), (1, 1), (300, 300), (17, 40)):
        low, high = wilson(hits, n)
        assert 0 <= low <= hits / n <= high <= 1
        assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low))
    assert wilson(0, 0) == (0.0, 1.0)


def test_right_blurred_and_absent_are_told_apart():
    planted = torch.tensor([[10, 11, 12], [20, 21, 22]])
    asked = torch.tensor([[10, 11, 12], [22, 20, 20]])
    said = torch.tensor([[10, 12, 99], [22, 10, 21]])  # right, blurred, absent; right, another row's (absent), blurred
    found = score(said, asked, planted)
    assert found == Score(exact=2, near=2, n=6)
    record = (found + Score(1, 0, 2)).record()
    assert record["n"] == 8 and record["exact"] == 3 / 8 and record["near"] == 2 / 8 and record["absent"] == 3 / 8
    assert (record["low"], record["high"]) == wilson(3, 8)
