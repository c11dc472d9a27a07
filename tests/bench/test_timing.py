"""Interleaving, medians and budgets of the timings, and the records made of them."""

from __future__ import annotations

import time

import pytest

from slipstream.bench.memory import peak_bytes
from slipstream.bench.speed import measure, state_record
from slipstream.bench.timing import Timing, interleaved, ratio, summary
from slipstream.models.language_model import language_model


def test_competitors_take_turns_and_the_first_round_is_discarded():
    calls: list[str] = []

    def a() -> None:
        calls.append("a")
        time.sleep(0.2 if calls.count("a") == 1 else 0.01)  # slow at first, as a cold cache is

    found = interleaved({"a": a, "b": lambda: calls.append("b")}, seconds=0.5)
    assert calls[:6] == ["a", "b"] * 3
    assert found["a"].runs == found["b"].runs == len(calls) // 2 - 1
    assert 0.01 <= found["a"].seconds < 0.1 and ratio(found["a"], found["b"]) > 1


def test_without_time_every_competitor_still_runs_once():
    found = interleaved({"a": lambda: time.sleep(0.01)}, seconds=0.0)
    assert found["a"].runs == 1 and found["a"].spread == 0.0


def test_least_rounds_are_kept_whatever_the_time():
    assert interleaved({"a": lambda: None}, seconds=0.0, least=4)["a"].runs == 4


def test_median_and_half_the_interquartile_range():
    assert summary([1.0, 2.0, 3.0, 4.0, 100.0]) == Timing(3.0, 1.0, 5)


def test_speed_records_are_complete():
    models = {a: language_model(a, n_layers=2, d_model=16) for a in ("lstm", "attention")}
    told: list[float] = []
    records = measure(
        models, lengths=(40, 8), contexts=(8,), seconds=0.2, on_progress=lambda share, text: told.append(share)
    )
    assert [r["arch"] for r in records] == ["lstm", "attention"]
    for record in records:
        assert record["kind"] == "speed" and record["train"] > 0
        assert [p[0] for p in record["prefill"]] == [8, 40] and [p[0] for p in record["decode"]] == [8]
        assert all(len(p) == 3 and p[1] > 0 and p[2] >= 0 for p in record["prefill"] + record["decode"])
    assert told == sorted(told) and told[-1] == 1.0
    assert all(p.grad is None for m in models.values() for p in m.parameters())


def test_state_bytes_grow_only_where_memory_does():
    lstm, attention = (language_model(a, n_layers=2, d_model=16) for a in ("lstm", "attention"))
    assert state_record("lstm", lstm, [10, 1000]) == {
        "kind": "state",
        "arch": "lstm",
        "bytes": [[10, 256], [1000, 256]],
        "moved": [[10, lstm.bytes_per_token(10)], [1000, lstm.bytes_per_token(1000)]],
    }
    assert state_record("attention", attention, [10, 1000])["bytes"] == [
        [10, 2 * 2 * 16 * 4 * 10],
        [1000, 2 * 2 * 16 * 4 * 1000],
    ]


def test_peak_memory_sees_what_a_prompt_needs():
    config = language_model("attention", n_layers=1, d_model=64).config
    short, long = peak_bytes(config, 256), peak_bytes(config, 8192)
    assert long > 8192 * 64 * 4 > short  # one activation, at the least


def test_a_child_that_fails_says_why():
    config = language_model("attention", n_layers=1, d_model=64).config
    with pytest.raises(RuntimeError, match="-1"):
        peak_bytes(config, -1)


def test_a_token_moves_the_weights_it_uses_and_what_is_remembered():
    def moved(arch: str, context: int) -> int:
        return language_model(arch, n_layers=1, d_model=16, vocab_size=64).bytes_per_token(context)

    head = 64 * 16 * 4
    assert moved("mlp(d_ff=32)/none", 0) == head + 2 * 16 * 32 * 4
    assert moved("attention/none", 9) - moved("attention/none", 0) == 9 * 2 * 16 * 4
    assert moved("lstm/none", 9) == moved("lstm/none", 0)
    two, four = (moved(f"moe(n_experts={n}, top_k=1, normalised=false, d_expert=8)/none", 0) for n in (2, 4))
    assert four - two == 2 * 16 * 4  # rows of the router; experts that are not chosen are not read
