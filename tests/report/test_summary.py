"""Records become rows; what is missing is named, nothing is made up."""

from __future__ import annotations

import pytest

from slipstream.report.summary import summarise
from tests.report.records import CURVES, comparison, of


def test_rows_hold_the_numbers_of_the_records():
    summary = summarise(comparison())
    assert [row.arch for row in summary.rows] == sorted(CURVES, key=lambda arch: CURVES[arch][2])
    row = next(r for r in summary.rows if r.arch == "mamba2")
    quality, recall, speed, state = of("mamba2")[1:]
    assert row.bpb is not None and row.bpb.value == quality["val_bpb"]
    assert row.train_rate is not None and row.train_rate.value == speed["train"]
    assert [(n, m.value) for n, m in row.prefill.items()] == [(n, s) for n, s, _ in speed["prefill"]]
    assert [(n, m.value) for n, m in row.decode.items()] == [(n, ms) for n, ms, _ in speed["decode"]]
    assert [[n, m.value] for n, m in row.state.items()] == state["bytes"]
    assert {d["distance"]: (d["exact"], d["low"], d["high"]) for d in recall["distance"]} == {
        d: (m.value, m.low, m.high) for d, m in row.recall.items()
    }
    assert row.examples_to_solve == recall["examples_to_solve"]
    assert (row.family, row.growth, row.gaps) == ("ssm", "constant", [])
    assert summary.finished


def test_seeds_are_averaged():
    records = comparison(3)
    rows = {row.arch: row for row in summarise(records).rows}
    values = [r["val_bpb"] for r in records if r["kind"] == "quality" and r["arch"] == "retnet"]
    bpb = rows["retnet"].bpb
    assert bpb is not None and bpb.value == pytest.approx(sum(values) / 3)
    assert (rows["retnet"].seeds, len(rows["retnet"].curves)) == (3, 3)


def test_of_a_record_that_comes_twice_the_later_counts():
    again = {**of("lstm")[1], "val_bpb": 1.5}
    rows = {row.arch: row for row in summarise([*comparison(), again]).rows}
    assert rows["lstm"].bpb is not None and rows["lstm"].bpb.value == 1.5
    assert rows["lstm"].seeds == 1


def test_compared_at_the_lengths_that_were_measured():
    summary = summarise(comparison())
    assert (summary.far, summary.prefill_lengths, summary.decode_contexts, summary.state_context) == (
        4096,
        [512, 2048, 8192],
        [512, 8192],
        8192,
    )
    short = summarise(
        [
            {
                "kind": "speed",
                "arch": "a",
                "prefill": [[128, 1.0, 0.1], [256, 2.0, 0.1], [384, 3.0, 0.1], [640, 4.0, 0.1]],
            },
            {"kind": "state", "arch": "a", "bytes": [[100, 8], [1000, 8]]},
        ]
    )
    assert (short.prefill_lengths, short.decode_contexts, short.state_context, short.far) == (
        [128, 384, 640],
        [],
        1000,
        None,
    )


def test_far_is_the_furthest_distance_that_all_share():
    near = {"kind": "recall", "arch": "new", "distance": [{"distance": 256, "exact": 0.5, "n": 50}]}
    assert summarise([*comparison(), near]).far == 256


def test_gaps_name_what_others_have():
    records = [
        r for r in comparison() if r.get("arch") != "tcn" and not (r.get("arch") == "lstm" and r["kind"] == "speed")
    ]
    records.append({"kind": "failed", "arch": "lstm", "stage": "speed", "reason": "out of memory"})
    rows = {row.arch: row for row in summarise(records).rows}
    assert rows["tcn"].gaps == ["not measured: bits per byte, recall, speed, state bytes"]
    assert rows["lstm"].gaps == ["speed failed: out of memory"]
    assert rows["mamba2"].gaps == []


def test_what_nobody_has_is_no_gap():
    records = [r for r in comparison() if r["kind"] != "recall"]
    assert all(row.gaps == [] for row in summarise(records).rows)


@pytest.mark.parametrize("fault", [{"val_bpb": float("nan")}, {"val_bpb": None}, {"diverged": True}])
def test_a_diverged_run_has_no_quality(fault):
    records = [{**r, **fault} if r["kind"] == "quality" and r["arch"] == "rwkv7" else r for r in comparison()]
    row = next(r for r in summarise(records).rows if r.arch == "rwkv7")
    assert row.bpb is None
    assert row.gaps == ["diverged in training (seed 0)"]


def test_family_and_growth_are_read_off_the_cards_when_no_record_says():
    rows = {row.arch: row for row in summarise([{"kind": "setup", "archs": ["attention", "2*lstm, attention"]}]).rows}
    assert (rows["attention"].family, rows["attention"].growth) == ("attention", "grows")
    assert rows["2*lstm, attention"].family == "hybrid"
