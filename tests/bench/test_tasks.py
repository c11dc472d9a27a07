"""The labels of every task, worked out again by reading its rows one token at a time; and that batches repeat."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from slipstream.bench.copying import SEPARATOR, Copying
from slipstream.bench.facts import BYTES, Facts
from slipstream.bench.mqar import BLANK, Mqar
from slipstream.bench.task import Level
from slipstream.core.errors import InputError

TEXT = bytes(range(97, 123)) * 3  # shorter than most rows: it has to go round
TASKS = {"facts": Facts(TEXT, 16), "mqar": Mqar(16), "copying": Copying(16)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", TASKS)
def test_same_generator_same_batch(name):
    task = TASKS[name]
    a, b, c = (task.batch(5, task.goal, seeded(s)) for s in (3, 3, 4))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.answers, b.answers)
    assert not torch.equal(a.tokens, c.tokens)


@pytest.mark.parametrize("name", TASKS)
def test_every_token_is_in_the_vocabulary_and_every_answer_among_the_choices(name):
    task = TASKS[name]
    for level in [*task.ladder(), Level(pairs=4, symbols=5, gap=9)]:
        batch = task.batch(20, level, seeded())
        assert batch.tokens.min() >= 0 and batch.tokens.max() < task.vocab_size
        assert len(batch.choices) == level.symbols
        assert torch.isin(batch.answers, batch.choices).all() and torch.isin(batch.planted, batch.choices).all()
        assert batch.choices.tolist() == list(range(int(batch.choices[0]), int(batch.choices[-1]) + 1))
    assert task.ladder()[-1] == task.goal


def read(task: Facts, row: list[int], until: int) -> dict[int, list[int]]:
    """All values of each key in a row, in order."""
    found: dict[int, list[int]] = {}
    for here, after in pairwise(row[: until + 1]):
        if BYTES <= here < BYTES + task.n_symbols:
            assert after >= BYTES + task.n_symbols, "a key is followed by its value"
            found.setdefault(here, []).append(after)
    return found


@pytest.mark.parametrize("gap", [0, 1, 50])
def test_facts_are_planted_in_the_text_and_asked_after_the_gap(gap):
    task, level = TASKS["facts"], Level(pairs=5, symbols=16, gap=gap)
    batch = task.batch(30, level, seeded())
    for row, asked, answers, planted in zip(
        *(t.tolist() for t in (batch.tokens, batch.asked, batch.answers, batch.planted))
    ):
        first = asked[0]
        facts = read(task, row, first)
        assert [len(v) for v in facts.values()] == [1] * 5
        assert sorted(row[i] for i in asked) == sorted(facts) and len(set(planted)) == 5
        assert [facts[row[i]][0] for i in asked] == answers == [row[i + 1] for i in asked]
        last = max(i for i in range(first) if row[i] >= BYTES)
        assert first - last > gap
        text = bytes(t for t in row[last + 1 : first])
        assert text in TEXT * 3


def test_the_last_value_of_a_fact_that_changed_is_the_answer():
    task = TASKS["facts"]
    batch = task.batch(30, Level(pairs=4, symbols=16, gap=3), seeded(), updates=True)
    for row, asked, answers in zip(*(t.tolist() for t in (batch.tokens, batch.asked, batch.answers))):
        facts = read(task, row, asked[0])
        assert [len(v) for v in facts.values()] == [2] * 4
        assert all(facts[row[i]][1] == a != facts[row[i]][0] for i, a in zip(asked, answers))


def test_an_empty_text_is_refused():
    with pytest.raises(InputError, match="empty"):
        Facts(b"")


def test_mqar_asks_each_key_once_more_and_nearer_places_more_often():
    task = TASKS["mqar"]
    batch = task.batch(400, Level(pairs=3, symbols=16, gap=20), seeded())
    places = Counter()
    for row, asked, answers in zip(*(t.tolist() for t in (batch.tokens, batch.asked, batch.answers))):
        pairs = dict(zip(row[0:6:2], row[1:6:2]))
        assert len(pairs) == 3 and [pairs[row[i]] for i in asked] == answers
        assert sorted(asked) == [i for i in range(6, len(row)) if row[i] != BLANK]
        places.update(i - 6 for i in asked)
    shares = [places[2 * i] / 400 for i in range(13)]
    assert (
        shares[0] > 0.7 > shares[1] > shares[4] > shares[12] > 0
    )  # 1/i: the first of 13 places is taken most of the time


def test_copying_wants_the_string_again():
    batch = TASKS["copying"].batch(10, Level(pairs=6, symbols=16, gap=2), seeded())
    for row, asked, answers in zip(*(t.tolist() for t in (batch.tokens, batch.asked, batch.answers))):
        assert row[8] == SEPARATOR and row[:6] == answers and row[9:] == answers[:-1]
        assert asked == list(range(8, 14))
