"""Pieces that join like a binary counter, and what is said of their number."""

from __future__ import annotations

import pytest

from slipstream.ops.pieces import Pieces, joins, met


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 21])
def test_order_is_kept_and_few_are_held(n):
    sides: list[int] = []
    held_before = 0

    def join(earlier: str, later: str) -> str:
        sides.append(len(earlier))
        return earlier + later

    pieces = Pieces(join)
    for i in range(n):
        assert len(list(pieces)) == i.bit_count()
        held_before += i.bit_count()
        pieces.append(chr(65 + i))
    assert "".join(pieces) == "".join(chr(65 + i) for i in range(n))
    assert met(n) == held_before
    assert sorted(side for side, times in joins(n) for _ in range(times)) == sorted(sides)
