"""The probe: what it trains, that it learns, that it keeps its time, and that its records are whole."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from slipstream.bench import recall
from slipstream.bench.facts import Facts
from slipstream.bench.learn import Pupil, learn
from slipstream.bench.probe_model import answer_logits, answers, probe_model, probe_pattern
from slipstream.bench.task import Batch, Level, Task

TEXT = b"It is a truth universally acknowledged, that a single man in possession of a good fortune, " * 20


def test_the_probe_is_two_layers_of_the_mixers_with_the_same_convolution():
    pattern, n_layers = probe_pattern("attention")
    assert n_layers == 2 and pattern == "attention(conv_size=4, rope_base=none)/none"
    assert probe_pattern("lstm") == ("lstm()/none", 2)
    assert "conv_size" not in probe_pattern("gated_deltanet")[0]  # has it by itself
    assert "rope_base=none" in probe_pattern("sliding_window(window=32)/mlp")[0]
    assert "window=32" in probe_pattern("sliding_window(window=32)/mlp")[0]


def test_a_hybrid_is_probed_with_one_layer_of_each_of_its_mixers():
    assert probe_pattern("3*gated_deltanet, attention")[1] == 2
    model = probe_model("3*gated_deltanet, attention", 300, 0)
    assert [type(m).name for m in model.stack.mixers()] == ["gated_deltanet", "attention"]


def test_what_the_pattern_says_wins():
    assert "conv_size=2" in probe_pattern("attention(conv_size=2)")[0]


def test_every_mixer_can_be_probed():
    from slipstream.core.cards import cards

    batch = Facts(TEXT).batch(2, Level(2, 8, 3), torch.Generator().manual_seed(0))
    for name in (c.name for c in cards().values() if c.family != "feedforward" and c.remembers):
        assert answer_logits(probe_model(name, Facts(TEXT).vocab_size, 0), batch).isfinite().all(), name


def test_logits_at_the_questions_are_those_of_the_whole_model():
    task = Facts(TEXT)
    model = probe_model("attention", task.vocab_size, 0)
    batch = task.batch(3, task.goal, torch.Generator().manual_seed(0))
    whole = model(batch.tokens)[torch.arange(3)[:, None], batch.asked][..., batch.choices]
    torch.testing.assert_close(answer_logits(model, batch), whole)
    assert torch.equal(answers(model, batch), whole.argmax(-1) + batch.choices[0])


class Successor(Task):
    """The answer is the next symbol: learned in seconds by anything, and not known before."""

    vocab_size, goal = 8, Level(pairs=4, symbols=8, gap=0)

    def batch(self, n: int, level: Level, generator: torch.Generator) -> Batch:
        tokens = torch.randint(level.symbols, (n, level.pairs), generator=generator)
        asked = torch.arange(level.pairs).expand(n, -1)
        return Batch(tokens, asked, (tokens + 1) % level.symbols, tokens, torch.arange(level.symbols))


def test_what_is_easy_is_learned_and_reported():
    model, told = probe_model("lstm", 8, 0), []
    learned = learn(model, Successor(), 30, 0, lambda share, text: told.append(share))
    assert learned.accuracy >= 0.99 and learned.examples_to_solve == learned.examples
    assert learned.curve[-1] == (learned.examples, learned.accuracy)
    assert learned.seconds < 30 and told == sorted(told)
    batch = Successor().batch(50, Successor.goal, torch.Generator().manual_seed(9))
    assert (
        answers(model, batch) == batch.answers
    ).float().mean() > 0.97  # the model that was given is the one that learned


def test_the_same_seed_gives_the_same_lessons():
    def after(seed: int) -> list[torch.Tensor]:
        task = Facts(TEXT)
        pupil = Pupil(probe_model("lstm", task.vocab_size, seed), task, seed)
        for _ in range(3):
            pupil.study()
        return list(pupil.examined.parameters())

    one, two, other = after(0), after(0), after(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not all(torch.equal(a, b) for a, b in zip(one, other))


def test_the_budget_is_kept_and_the_record_is_whole(monkeypatch):
    monkeypatch.setattr(recall, "DISTANCES", (16, 64))
    monkeypatch.setattr(recall, "LOADS", (4, 8))
    told, start = [], time.perf_counter()
    record = recall.recall_probe("lstm", TEXT, seconds=3, seed=1, on_progress=lambda share, text: told.append(share))
    assert time.perf_counter() - start < 6
    assert record["kind"] == "recall" and record["arch"] == "lstm" and record["seed"] == 1
    assert 0 < record["seconds"] < 3 and record["examples"] > 0 and record["examples_to_solve"] is None
    assert record["curve"][-1] == [record["examples"], record["accuracy"]]
    assert [p["distance"] for p in record["distance"]] == [16, 64] and [p["pairs"] for p in record["load"]] == [4, 8]
    for point in [*record["distance"], *record["load"], record["overwritten"]]:
        assert point["n"] > 0 and point["low"] <= point["exact"] <= point["high"]
        assert point["exact"] + point["near"] + point["absent"] == pytest.approx(1)
    assert record["state_bytes"] == 2 * 2 * 64 * 4  # two layers, h and c
    assert 0 < told[-1] <= 1


def test_the_questions_are_the_same_whatever_the_time_allows():
    task = Facts(TEXT)
    model = probe_model("lstm", task.vocab_size, 0)
    points = [p for p in recall.points(task) if p.level.gap < 100][:2]
    once = [s for _, s in recall.ask(model, task, points, time.perf_counter() + 60, 0)]
    hurried = [s for _, s in recall.ask(model, task, points, 0.0, 0)]
    assert [s.n for s in once] == [s.n for s in hurried] == [300, 304]
    assert once == hurried


def test_levels_of_the_probe_fit_their_symbols():
    task = Facts(TEXT, n_symbols=32)
    assert max(p.level.pairs for p in recall.points(task)) == 32
    assert replace(task.goal, gap=4096) in [p.level for p in recall.points(task)]
