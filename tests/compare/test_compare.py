"""Whole comparisons, small: everything is measured, work that is done is kept, a kill loses nothing that was done."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from slipstream.compare.config import CompareConfig
from slipstream.compare.run import Known, Progress, compare

SMALL = {"params": "30k", "tokens": 4096, "context": 32, "batch_size": 4, "lengths": "64,128", "contexts": "64,128"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "counting.txt"
    path.write_text("\n".join(f"{i} and {i + 1} make {2 * i + 1}." for i in range(600)))
    return path


@pytest.fixture(scope="module")
def first(text, tmp_path_factory):
    """A comparison of two, with everything it said."""
    out, said = tmp_path_factory.mktemp("out"), []
    config = CompareConfig(data=str(text), archs="lstm,attention", out=out, budget="20s", **SMALL)
    return config, compare(config, said.append), said


def by(records, kind):
    return {r["arch"]: r for r in records if r["kind"] == kind}


def test_everything_is_measured(first):
    _, records, _ = first
    for kind in ("quality", "recall", "speed", "state", "model"):
        assert set(by(records, kind)) == {"lstm", "attention"}, kind
    assert not by(records, "failed")
    setup = records[0]
    assert setup["kind"] == "setup" and setup["finished"] and setup["tokens"] == 4096
    assert 0 < setup["baseline_bpb"]["xz"] < setup["baseline_bpb"]["unigram"] < 8


def test_the_comparison_is_fair(first):
    _, records, _ = first
    models, quality = by(records, "model"), by(records, "quality")
    assert abs(models["lstm"]["params"] - models["attention"]["params"]) <= 0.04 * 30_000
    assert quality["lstm"]["tokens"] == quality["attention"]["tokens"] == 4096
    assert len(quality["lstm"]["val_windows"]) == len(quality["attention"]["val_windows"]) > 1


def test_numbers_are_where_they_must_be(first):
    _, records, _ = first
    for arch in ("lstm", "attention"):
        quality, speed = by(records, "quality")[arch], by(records, "speed")[arch]
        assert 0 < quality["val_bpb"] < 8 and quality["curve"][-1][0] == 4096
        assert [row[0] for row in speed["prefill"]] == [64, 128] == [row[0] for row in speed["decode"]]
        assert all(row[1] > 0 for row in speed["prefill"] + speed["decode"]) and speed["train"] > 0
    state = {arch: dict(r["bytes"]) for arch, r in by(records, "state").items()}
    assert state["lstm"][64] == state["lstm"][128] and state["attention"][128] == 2 * state["attention"][64]


def test_progress_comes_with_an_estimate(first):
    _, _, said = first
    shares = [e.share for e in said if isinstance(e, Progress)]
    assert len(shares) > 5 and all(0 <= s <= 1 for s in shares)
    assert isinstance(said[-1], Known)


def test_one_architecture_more_runs_only_that_one(first):
    config, before, _ = first
    started = []
    more = config.model_copy(update={"archs": [*config.archs, "sliding_window(window=8)"]})
    after = compare(more, lambda e: started.extend(e.now) if isinstance(e, Progress) else None)
    assert all(n == "timing" or n.endswith("sliding_window(window=8)") for n in started)
    for kind in ("quality", "recall", "speed"):
        assert by(after, kind)["lstm"] == by(before, kind)["lstm"]
        assert "sliding_window(window=8)" in by(after, kind)


def test_an_architecture_that_fails_does_not_end_the_others(text, tmp_path):
    archs = ["lstm", "attention(n_heads=7)"]
    records = compare(CompareConfig(data=str(text), archs=archs, out=tmp_path, budget="5s", measure="quality", **SMALL))
    assert set(by(records, "quality")) == {"lstm"}
    assert "does not divide" in by(records, "failed")["attention(n_heads=7)"]["reason"]
    assert not records[0]["finished"]


def test_a_killed_comparison_goes_on(text, tmp_path):
    """Killed while it trains, the same command keeps what was measured and ends with the same numbers as one left alone."""
    settings = [f"--{k.replace('_', '-')}={v}" for k, v in (SMALL | {"tokens": 40960}).items()]
    program = [sys.executable, "-m", "slipstream.cli.app", "compare", str(text)]
    call = [*program, "--archs=lstm,attention", "--measure=quality", *settings]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*call, f"--out={killed}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = killed / "models" / "lstm" / "seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 20):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for out in (killed, whole):
        subprocess.run([*call, f"--out={out}"], check=True, capture_output=True, timeout=300)
    found = {}
    for out in (killed, whole):
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        found[out.name] = {r["arch"]: r["val_windows"] for r in lines if r["kind"] == "quality"}
        assert (out / "report.html").stat().st_size > 10_000
    assert found["killed"] == found["whole"]
