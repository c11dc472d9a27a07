"""The sentences follow the numbers: a win needs more than noise, and nothing is said of what was not measured."""

from __future__ import annotations

from typing import Any

import pytest

from slipstream.report.picks import picks
from slipstream.report.summary import Summary, summarise
from slipstream.report.verdict import Answer, answers, caveats
from tests.report.records import comparison

QUALITY, RECALL, PREFILL, DECODE, MEMORY = range(5)


def answer(records: list[dict[str, Any]], which: int) -> Answer:
    return answers(summarise(records))[which]


def quality(arch: str, bpb: float, stderr: float = 0.005, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"kind": "quality", "arch": arch, "seed": seed, "val_bpb": bpb, "val_stderr": stderr, **more}


def recall(arch: str, exact: float, low: float, high: float, distance: int = 4096) -> dict[str, Any]:
    return {
        "kind": "recall",
        "arch": arch,
        "distance": [{"distance": distance, "exact": exact, "low": low, "high": high, "n": 300}],
    }


def speed(arch: str, at_512: float, at_8k: float, read: float = 1.0, spread: float = 0.01) -> dict[str, Any]:
    decode = [[512, at_512, at_512 * spread], [8192, at_8k, at_8k * spread]]
    return {
        "kind": "speed",
        "arch": arch,
        "prefill": [[512, read / 16, read / 16 * spread], [8192, read, read * spread]],
        "decode": decode,
    }


def state(arch: str, size: int, growth: str = "constant") -> list[dict[str, Any]]:
    return [
        {"kind": "state", "arch": arch, "bytes": [[8192, size]]},
        {"kind": "model", "arch": arch, "state_growth": growth},
    ]


def pick(summary: Summary, use: str) -> Any:
    return next((p for p in picks(summary) if use in p.use), None)


def test_a_clear_win_gives_the_figure_and_the_runner_up():
    found = answer([quality("a", 2.0), quality("b", 2.2), quality("c", 2.4)], QUALITY)
    assert (found.kind, found.arches) == ("clear", ("a",))
    assert found.text == "`a` with 2.00 bits per byte; next is `b` with 2.20."


def test_a_difference_inside_the_noise_is_a_tie():
    found = answer([quality("a", 2.00, 0.02), quality("b", 2.03, 0.02), quality("c", 2.4)], QUALITY)
    assert (found.kind, found.arches) == ("tie", ("a", "b"))
    assert found.text.startswith(
        "A tie: `a` with 2.00 bits per byte and `b` with 2.03 (the difference is within the noise)"
    )
    assert "next is `c` with 2.40" in found.text


def test_all_within_the_noise():
    found = answer([quality("a", 2.00, 0.1), quality("b", 2.03, 0.1)], QUALITY)
    assert found.kind == "tie"
    assert found.text.startswith("All of them tie:")


def test_seeds_that_disagree_make_a_tie_of_a_win():
    steady = [quality(arch, bpb, seed=s) for arch, bpb in (("a", 2.0), ("b", 2.1)) for s in (0, 1)]
    shaky = [quality("a", 1.9), quality("a", 2.1, seed=1), quality("b", 2.1), quality("b", 2.1, seed=1)]
    assert answer(steady, QUALITY).kind == "clear"
    assert answer(shaky, QUALITY).kind == "tie"


def test_one_alone_wins_nothing():
    found = answer([quality("a", 2.0)], QUALITY)
    assert (found.kind, found.text) == ("open", "`a` with 2.00 bits per byte; there is nothing to compare it with.")


def test_models_that_have_not_learned_are_not_ranked_or_picked():
    records = [
        {"kind": "setup", "baseline_bpb": {"unigram": 4.4}},
        quality("a", 5.0),
        quality("b", 5.5),
        speed("a", 1, 1),
        speed("b", 2, 2),
    ]
    found = answer(records, QUALITY)
    assert found.kind == "open"
    assert found.text.startswith("None beats byte frequencies alone yet")
    assert picks(summarise(records)) == []
    assert any("byte frequencies alone (4.40)" in c for c in caveats(summarise(records)))


def test_nothing_measured_says_so():
    assert [a.text for a in answers(summarise([]))] == ["Not measured."] * 5
    assert picks(summarise([])) == []
    assert caveats(summarise([])) == ["Nothing has been measured yet."]


def test_recall_tie_by_intervals():
    found = answer([recall("a", 0.99, 0.97, 1.0), recall("b", 0.97, 0.94, 0.985), recall("c", 0.5, 0.45, 0.55)], RECALL)
    assert (found.kind, found.arches) == ("tie", ("a", "b"))
    assert "99.0 % [97.0–100.0] exact at 4,096 tokens" in found.text


def test_recall_that_nobody_has_is_no_win():
    found = answer([recall("a", 0.2, 0.15, 0.25), recall("b", 0.05, 0.03, 0.08)], RECALL)
    assert found.kind == "open"
    assert found.text.startswith("None of them")


@pytest.mark.parametrize(("other", "kind"), [(1.03, "tie"), (1.2, "clear")])
def test_times(other, kind):
    records = [speed("a", 1.0, 1.0, 1.0), speed("b", other, other, other)]
    assert answer(records, PREFILL).kind == kind
    assert answer(records, DECODE).kind == kind


def test_a_noisy_time_is_a_tie():
    assert answer([speed("a", 1.0, 1.0, spread=0.3), speed("b", 1.2, 1.2, spread=0.3)], DECODE).kind == "tie"


def test_prefill_is_told_in_seconds_and_tokens_a_second():
    found = answer([speed("a", 1, 1, read=2.0), speed("b", 1, 1, read=4.0)], PREFILL)
    assert found.text == "`a` with 2 s (4.1k tokens/s) for 8,192 tokens; next is `b` with 4 s (2.05k tokens/s)."


def test_memory_names_the_least_the_next_and_the_most():
    found = answer([*state("a", 1024), *state("b", 4096), *state("c", 1 << 20)], MEMORY)
    assert (
        found.text
        == "`a` with 1 KiB at 8,192 tokens; next is `b` with 4 KiB; the most is `c` with 1 MiB, 1,024 times as much."
    )


def test_memory_of_nothing_at_all():
    found = answer([*state("a", 0), *state("b", 4096)], MEMORY)
    assert found.text == "`a` with 0 B at 8,192 tokens; next is `b` with 4 KiB."
    found = answer([*state("a", 1024), *state("b", 4096)], MEMORY)
    assert found.text == "`a` with 1 KiB at 8,192 tokens; next is `b` with 4 KiB, 4.0 times as much."


def test_facts_go_to_the_smallest_state_of_those_that_tie():
    records = [recall("big", 0.99, 0.97, 1.0), recall("small", 0.98, 0.96, 0.99), recall("weak", 0.5, 0.4, 0.6)]
    records += [*state("big", 1 << 20), *state("small", 1 << 10), *state("weak", 8)]
    found = pick(summarise(records), "Facts")
    assert found.arch == "small"
    assert "98.0 % [96.0–99.0] exact at 4,096 tokens with 1 KiB of state" in found.why
    assert "`weak`, gives 50.0 %" in found.why


def test_no_pick_for_facts_when_none_is_reliable():
    found = pick(summarise([recall("a", 0.92, 0.88, 0.95), recall("b", 0.5, 0.4, 0.6)]), "Facts")
    assert found.arch is None
    assert found.why.startswith("none here is safe")


def test_many_users_get_a_small_state_that_predicts_well():
    records = [quality("tiny", 2.6), quality("small", 2.05), quality("best", 2.0)]
    records += [*state("tiny", 8), *state("small", 1 << 14), *state("best", 1 << 24, "grows")]
    records += [speed("small", 1.0, 1.0), speed("best", 1.0, 4.0)]
    found = pick(summarise(records), "many users")
    assert found.arch == "small"
    assert (
        found.why
        == "its state is 16 KiB a user at 8,192 tokens against 16 MiB for `best`, and a token costs 1.00 ms whatever the context"
    )


def test_a_pick_that_forgets_says_so():
    records = [
        quality("a", 2.0),
        quality("b", 2.01),
        *state("a", 8),
        *state("b", 1 << 20),
        recall("a", 0.3, 0.25, 0.35),
    ]
    assert "Not for exact facts: it found 30.0 %" in pick(summarise(records), "many users").why


def test_a_device_needs_a_bounded_state():
    records = [
        quality("grows", 2.0),
        quality("fixed", 2.02),
        *state("grows", 1 << 24, "grows"),
        *state("fixed", 1 << 14),
    ]
    records += [speed("grows", 0.1, 0.1), speed("fixed", 1.0, 1.0)]
    assert pick(summarise(records), "edge device").arch == "fixed"


@pytest.mark.parametrize(("attention_ms", "chosen"), [(1.1, "attention"), (2.0, "other")])
def test_short_texts_go_to_attention_unless_it_is_slow(attention_ms, chosen):
    records = [
        quality("attention", 2.0),
        quality("other", 2.02),
        *state("attention", 1 << 24, "grows"),
        *state("other", 1 << 14),
    ]
    records += [speed("attention", attention_ms, 9.0), speed("other", 1.0, 1.0)]
    assert pick(summarise(records), "Short texts").arch == chosen


def test_only_prediction_takes_the_fastest_to_train_of_a_tie():
    records = [
        quality("slow", 2.00, 0.02, tokens_per_second=100.0),
        quality("fast", 2.01, 0.02, tokens_per_second=900.0),
    ]
    found = pick(summarise(records), "Only the prediction")
    assert found.arch == "fast"
    assert "of the 2 that tie" in found.why


def test_caveats_begin_with_what_is_wrong():
    records = comparison()
    records[0] = {**records[0], "finished": False}
    records = [r for r in records if r.get("arch") != "tcn"]
    said = caveats(summarise(records))
    assert said[0].startswith("This comparison is not finished")
    assert said[1] == "`tcn`: not measured: bits per byte, recall, speed, state bytes."
    assert any(c.startswith("One seed") for c in said)
    assert not any(c.startswith("One seed") for c in caveats(summarise(comparison(2))))


def test_a_probe_that_never_learned_is_named():
    said = caveats(summarise(comparison()))
    assert any(c.startswith("`lstm` and `tcn` did not learn to look facts up") for c in said)
    assert not any("`mamba2`" in c for c in said)


def test_probes_that_all_failed_to_learn_settle_nothing():
    records = [recall(arch, 0.02, 0.01, 0.04) | {"examples_to_solve": None, "examples": 9000} for arch in ("a", "b")]
    assert answer(records, RECALL).text == "Not settled: none learned to look facts up in the time given."
    records += [quality("a", 2.0), quality("b", 2.01), *state("a", 8), *state("b", 1 << 20)]
    assert "Whether it keeps exact facts is open" in pick(summarise(records), "many users").why
    assert pick(summarise(records), "Facts").arch is None


def test_every_pick_and_answer_of_a_whole_comparison():
    summary = summarise(comparison())
    assert [a.kind for a in answers(summary)] == ["tie", "tie", "clear", "clear", "clear"]
    assert len(picks(summary)) == 6
    assert {p.arch for p in picks(summary)} <= {row.arch for row in summary.rows}
