"""The terminal's table fits, keeps what matters most, and says what the page says."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from slipstream.report.picks import picks
from slipstream.report.summary import summarise
from slipstream.report.table import print_table
from slipstream.report.verdict import answers
from tests.report.records import comparison


def printed(records, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table(records, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_it_fits(width):
    lines = printed(comparison(), width).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= min(width, 100)
    assert "gated_deltanet" in lines[2]
    assert "2.12 ±0.02*" in lines[2]


def test_a_narrow_screen_drops_the_least_important_columns():
    wide, narrow = (printed(comparison(), width).splitlines()[0] for width in (100, 60))
    assert "train" in wide and "prefill 8k" in wide and "state 8k" in wide
    assert "recall at 4k" in narrow and "train" not in narrow


def test_it_says_what_the_page_says():
    summary = summarise(comparison())
    said = " ".join(printed(comparison(), 70).split())
    for sentence in [a.text for a in answers(summary)] + [p.why for p in picks(summary)]:
        assert sentence.replace("`", "") in said


def test_missing_records():
    assert "Nothing has been measured yet." in printed([], 80)
    only_state = printed([r for r in comparison() if r["kind"] == "state"], 80)
    assert "lstm" in only_state and "8 KiB*" in only_state
