"""When two numbers differ, and when that is noise."""

from __future__ import annotations

import pytest

from slipstream.report.measure import Measure, exactly, leaders, over_seeds, ranked, rate, share, timing


def test_apart_uses_the_sides_of_the_intervals_that_face_each_other():
    lopsided = Measure(0.99, 0.90, 1.0)
    assert not lopsided.apart(Measure(0.91, 0.89, 0.93))  # its long lower side faces the other
    assert Measure(0.91, 0.89, 0.93).apart(Measure(0.80, 0.70, 0.81))  # the other's short upper side does
    assert exactly(8).apart(exactly(9))
    assert not exactly(8).apart(exactly(8))


def test_apart_is_symmetric():
    a, b = Measure(2.10, 2.06, 2.14), Measure(2.15, 2.12, 2.18)
    assert a.apart(b) == b.apart(a) is False
    assert a.apart(Measure(2.20, 2.19, 2.21)) == Measure(2.20, 2.19, 2.21).apart(a) is True


def test_same_windows_are_compared_window_by_window():
    hard = [2.0, 2.8, 2.2, 2.6] * 16
    a = over_seeds([2.40], [0.04], [hard])
    b = over_seeds([2.42], [0.04], [[w + 0.02 for w in hard]])
    assert not Measure(a.value, a.low, a.high).apart(Measure(b.value, b.low, b.high))  # as two separate numbers: a tie
    assert a.apart(b) == (0.02 > 1.96 * 2**0.5 * 0.0025 * 2.41)  # paired, only the assumed deviation over seeds is left
    assert a.apart(over_seeds([2.45], [0.04], [[w + 0.05 for w in hard]]))


def test_seeds_that_disagree_widen_the_interval():
    assert over_seeds([2.1, 2.3], [0.01, 0.01]).half > 5 * over_seeds([2.2, 2.2], [0.01, 0.01]).half
    assert over_seeds([2.1, 2.3], [0.01, 0.01]).value == pytest.approx(2.2)


def test_one_seed_is_never_taken_as_exact():
    assert not over_seeds([2.20], [0.0]).apart(over_seeds([2.21], [0.0]))


def test_share_pools_seeds_and_holds_each_of_them():
    pooled = share([(1.0, 100), (0.2, 100)])
    assert pooled.value == pytest.approx(0.6)
    assert pooled.low <= 0.2
    assert pooled.high >= 1.0
    one = share([(0.5, 100)])
    assert (one.low, one.high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson's interval, by hand


def test_times_closer_than_what_a_shared_machine_allows_are_a_tie():
    assert not timing(1.00, 0.001).apart(timing(1.04, 0.001))
    assert timing(1.00, 0.001).apart(timing(1.06, 0.001))
    assert not timing(1.00, 0.0).apart(timing(1.15, 0.0))  # one repetition each


def test_rate_turns_seconds_round():
    m = rate(1000.0, Measure(2.0, 1.6, 2.5))
    assert (m.low, m.value, m.high) == pytest.approx((400.0, 500.0, 625.0))


def test_ranking_and_leaders():
    items = {"a": exactly(3), "b": exactly(1), "c": None, "d": exactly(1)}
    order = ranked(list(items), items.get, True)
    assert [name for name, _ in order] == ["b", "d", "a"]
    assert [name for name, _ in leaders(order)] == ["b", "d"]
    assert [name for name, _ in ranked(list(items), items.get, False)] == ["a", "b", "d"]
