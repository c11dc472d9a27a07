"""Three significant digits, never an exponent."""

from __future__ import annotations

import pytest

from slipstream.core.quantities import bytes_in_words, duration_in_words, in_words
from slipstream.report.labels import placed
from slipstream.report.measure import Measure
from slipstream.report.wording import digits, length, listed, percent, times


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (2.1, "2.10"),
        (9.999, "10.0"),
        (0.01234, "0.0123"),
        (12345.6, "12,300"),
        (999.6, "1,000"),
        (0.0, "0"),
        (-1.5, "-1.50"),
    ],
)
def test_digits(x, text):
    assert digits(x) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (0.004, "4 ms"), (1.25, "1.25 s"), (290.0, "4 min 50 s"), (7260.0, "2 h 1 min")]
)
def test_duration(seconds, text):
    assert duration_in_words(seconds) == text


def test_no_exponents_near_the_next_unit():
    assert bytes_in_words(1020 * 1024) == "1,020 KiB"
    assert in_words(999_999.0) == "1,000k"
    assert times(99.96) == "100 times"


def test_words():
    assert (length(2048), length(512), length(3000)) == ("2k", "512", "3,000")
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(list("abcdef"), at_most=4) == "a, b, c, d and 2 more"
    assert percent(Measure(0.982, 0.96, 0.993)) == "98.2 % [96.0–99.3]"


def test_labels_of_near_points_take_different_sides():
    chosen = placed([("first", 1000.0, 2.0), ("second", 1010.0, 2.001), ("far", 9000.0, 2.5)])
    assert chosen["first"] != chosen["second"]
    assert chosen["far"].endswith("left")  # at the right edge there is room to the left only
