"""The labels of the capability tasks, worked out again from their rows one token at a time; the script's records; the page."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slipstream.bench import copy_memory, induction, selective_copying
from slipstream.bench.adding import Lessons, adder, adding, error, learn_adding
from slipstream.bench.copy_memory import CopyMemory
from slipstream.bench.induction import Induction
from slipstream.bench.learn import Pace, Pupil
from slipstream.bench.modular_arithmetic import MINUS, MODULUS, PLUS, TIMES, ModularArithmetic
from slipstream.bench.parity import Parity
from slipstream.bench.probe_model import answer_logits, probe_model, probe_pattern
from slipstream.bench.selective_copying import SelectiveCopying
from slipstream.bench.task import Batch, Task

ROOT = Path(__file__).parents[2]
TASKS: dict[str, Task] = {
    "parity": Parity(12),
    "modular_arithmetic": ModularArithmetic(8),
    "selective_copying": SelectiveCopying(5, 30),
    "induction": Induction(40),
    "copy_memory": CopyMemory(20),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens, places of the questions, and answers, row by row."""
    return list(zip(batch.tokens.tolist(), batch.asked.tolist(), batch.answers.tolist()))


@pytest.mark.parametrize("name", TASKS)
def test_same_generator_same_batch(name):
    task = TASKS[name]
    a, b, c = (task.batch(5, task.goal, seeded(s)) for s in (3, 3, 4))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.answers, b.answers)
    assert not torch.equal(a.tokens, c.tokens)


@pytest.mark.parametrize("name", TASKS)
def test_every_level_is_within_the_vocabulary_and_the_row(name):
    task = TASKS[name]
    drawn = [task.drawn(rung, seeded(s)) for rung in task.ladder() for s in range(5)]
    for level in [*task.ladder(), *drawn, replace(task.goal, gap=task.goal.gap + 9)]:
        batch = task.batch(20, level, seeded())
        assert batch.tokens.min() >= 0 and batch.tokens.max() < task.vocab_size
        assert batch.asked.min() >= 0 and batch.asked.max() < batch.tokens.shape[1]
        assert torch.isin(batch.answers, batch.choices).all() and torch.isin(batch.planted, batch.choices).all()
        assert batch.choices.tolist() == list(range(int(batch.choices[0]), int(batch.choices[-1]) + 1))
    assert task.ladder()[-1] == task.goal and all(level.gap <= task.goal.gap for level in drawn)


@pytest.mark.parametrize("name", TASKS)
def test_no_answer_is_the_same_in_every_row(name):
    task = TASKS[name]
    answers = task.batch(200, task.goal, seeded()).answers
    assert all(len(column.unique()) > 1 for column in answers.T)


@pytest.mark.parametrize("gap", [0, 7])
def test_parity_counts_the_ones_from_the_start(gap):
    level = replace(Parity(9).goal, gap=gap)
    for bits, asked, answers in rows(Parity().batch(30, level, seeded())):
        assert len(bits) == 9 + gap and asked == list(range(gap, gap + 9))
        assert answers == [sum(bits[: i + 1]) % 2 for i in asked]


@pytest.mark.parametrize("gap", [0, 5])
def test_modular_arithmetic_agrees_with_python(gap):
    task, signs = ModularArithmetic(8), {PLUS: "+", MINUS: "-", TIMES: "*"}
    for tokens, asked, answers in rows(task.batch(60, replace(task.goal, gap=gap), seeded())):
        text = "".join(signs.get(t, str(t)) for t in tokens)
        assert asked == list(range(2 * gap, len(text), 2)) and len(text) == 2 * (8 + gap) - 1
        assert answers == [eval(text[: i + 1]) % MODULUS for i in asked]


def test_modular_arithmetic_examples_of_the_paper_code():
    task = ModularArithmetic(3)
    batch = task.batch(3000, task.goal, seeded())
    found = {tuple(tokens): answers[-1] for tokens, _, answers in rows(batch)}
    assert found.get((1, PLUS, 2, TIMES, 3), 2) == 2 and found.get((1, MINUS, 1, MINUS, 1), 4) == 4
    assert len(found) > 700  # of 5^3 * 3^2 = 1125


def test_selective_copying_keeps_the_letters_in_order():
    blank, marker = selective_copying.BLANK, selective_copying.MARKER
    task = TASKS["selective_copying"]
    batch, places = task.batch(100, task.goal, seeded()), set()
    for tokens, asked, answers in rows(batch):
        assert [t for t in tokens[:30] if t != blank] == answers and marker not in tokens[:30]
        assert tokens[30:] == [marker] * 5 and asked == list(range(30, 35))
        places.add(tuple(i for i in range(30) if tokens[i] != blank))
    assert len(places) > 90  # the spacing varies


def test_induction_asks_for_what_stood_behind_the_special_token():
    task, places = TASKS["induction"], set()
    for tokens, asked, answers in rows(task.batch(400, task.goal, seeded())):
        first, last = (i for i, t in enumerate(tokens) if t == induction.SPECIAL)
        assert last == len(tokens) - 1 == 39 and asked == [39] and answers == [tokens[first + 1]]
        places.add(first)
    assert places == set(range(38))  # anywhere that leaves room for its letter


def test_copy_memory_is_laid_out_as_in_the_paper():
    task = CopyMemory(20)
    for tokens, asked, answers in rows(task.batch(30, task.goal, seeded())):
        assert len(tokens) == 20 + 20 and tokens[:10] == answers and all(1 <= d <= 8 for d in answers)
        assert tokens[10:29] == [0] * 19 and tokens[29:] == [copy_memory.SIGNAL] * 11
        assert asked == list(range(30, 40))
    assert task.drawn(task.goal, seeded()) == task.goal  # always the same silence


def test_adding_marks_two_numbers_and_wants_their_sum():
    inputs, sums = adding(500, 12, seeded())
    assert inputs.shape == (500, 12, 2)
    for row, total in zip(inputs.tolist(), sums.tolist()):
        marked = [number for number, mark in row if mark == 1]
        assert len(marked) == 2 and total == pytest.approx(sum(marked))
        assert all(mark in (0, 1) and 0 <= number < 1 for number, mark in row)
    assert torch.equal(sums, adding(500, 12, seeded())[1])
    assert float((sums - 1).square().mean()) == pytest.approx(1 / 6, abs=0.02)


def test_short_adding_is_learned():
    model, lessons = adder("lstm", 16, 0), Lessons(length=4, rows=64, steps=300, lr=1e-2, solved=5e-3)
    before = error(model, 4, seeded())
    assert learn_adding(model, lessons, 0) is not None
    assert error(model, 4, seeded()) < 0.01 < before
    assert learn_adding(adder("lstm", 16, 0), replace(lessons, steps=3), 0) is None


def test_parity_is_learned_by_an_lstm_within_its_pace():
    task = Parity(6)
    model = probe_model("lstm", task.vocab_size, 0, d_model=32)
    pupil = Pupil(model, task, 0, Pace(1e-2, 600))
    while pupil.steps < 200 and (len(pupil.rungs) > 1 or pupil.grasp < 0.999):
        pupil.study()
    assert pupil.grasp >= 0.999
    batch = task.batch(64, task.goal, seeded())
    right = answer_logits(model, batch).argmax(-1) == batch.answers
    assert right.float().mean() > 0.95  # the running mean, which is what is examined, has come along


def test_a_smaller_probe_has_a_smaller_state():
    assert "d_state=16" in probe_pattern("mamba", 32)[0] and "d_state=32" in probe_pattern("mamba")[0]
    assert "d_state=8" in probe_pattern("mamba(d_state=8)", 32)[0]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )


@pytest.mark.parametrize("task", ["parity", "adding"])
def test_the_script_keeps_what_is_done(task, tmp_path):
    command = ("bench/capabilities.py", "--task", task, "--archs", "lstm", "--budget", "2", "--out", str(tmp_path))
    for seeds, said in (("1", "lstm, seed 0: not solved"), ("2", "lstm, seed 1: not solved"), ("2", "")):
        done = run(*command, "--seeds", seeds)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(said) and bool(done.stdout) == bool(said)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["arch"], r["seed"]) for r in records] == [(task, "lstm", 0), (task, "lstm", 1)]
    assert all(r["steps"] == 2 and r["steps_to_solve"] is None and r["recipe"] for r in records)


def test_a_mixer_that_does_not_exist_is_refused_at_once(tmp_path):
    done = run("bench/capabilities.py", "--task", "parity", "--archs", "lstn", "--out", str(tmp_path))
    assert done.returncode and "lstm" in done.stderr and "Traceback" not in done.stderr


def module(path: str):
    """A script of this repository, imported."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


class Everyone(dict):
    """Results of every architecture, the same for all, at the exams of one task only."""

    def __init__(self, exams: list[str], result: float) -> None:
        self.exams, self.result = exams, result

    def __contains__(self, arch: object) -> bool:
        return True

    def __missing__(self, arch: str):
        return lambda exam: [self.result] * 3 if exam in self.exams else pytest.fail(f"{exam} is not asked")


def test_claims_are_about_exams_that_are_held_and_can_fail():
    script, sections = module("bench/capabilities.py"), module("docs/capability_claims.py").SECTIONS
    assert [s.task for s in sections] == [*script.TRIALS, "adding"]
    for section in sections:
        exams = script.recipe(section.task, None)["exams"]
        for claim in section.claims:
            verdicts = {result: claim.holds(Everyone(exams, result)) for result in (0.0, 0.5, 1.0)}
            assert None not in verdicts.values() and not all(verdicts.values()), claim.text
            assert claim.holds({}) is None, claim.text


def test_the_page_is_up_to_date():
    done = run("docs/capabilities.py", "--check")
    assert done.returncode == 0, done.stderr
