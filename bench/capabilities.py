#!/usr/bin/env python3
"""What architectures can and cannot do: small models learn a task whose answer is known, and are asked at greater lengths.

    python bench/capabilities.py --task parity --archs "mamba,deltanet,lstm" --seeds 5 --jobs 2

Every model has two layers of the mixer and no feed-forward, one learning rate a task for all architectures, and learns until it has
solved the task or used up a number of steps (not of seconds: the same seed gives the same record on a busy machine). Each record
is appended to docs/capabilities/results.jsonl as it is made; what stands there with the same recipe is not made again.
`python docs/capabilities.py` then renews docs/capabilities.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slipstream.bench.adding import Lessons, adder, error, learn_adding
from slipstream.bench.bound import run
from slipstream.bench.copy_memory import CopyMemory
from slipstream.bench.induction import Induction
from slipstream.bench.learn import SOLVED, Pace, Pupil
from slipstream.bench.modular_arithmetic import ModularArithmetic
from slipstream.bench.mqar import Mqar
from slipstream.bench.parity import Parity
from slipstream.bench.probe_model import answers, probe_model
from slipstream.bench.scoring import Score, score
from slipstream.bench.selective_copying import SelectiveCopying
from slipstream.bench.task import Level, Task
from slipstream.compare.results import Record, Results
from slipstream.compare.workers import Done, run_all
from slipstream.compare.workers import Task as Job
from slipstream.models.archs import separate
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import parse

FOLDER = Path(__file__).parent.parent / "docs" / "capabilities"
LOOK_EVERY, NEAR = 25, 0.95  # steps from one look at the goal to the next, once the running accuracy is that high
LOOKS = 512  # answers of one look
ASKED = 512  # answers at each length, where the tokens below allow
ROW_TOKENS, ALL_TOKENS = 2**17, 2**20  # most tokens read at once (bounds memory), and at one length
FEWEST = 32  # rows at the longest lengths

Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class Trial:
    """A task and what is asked of it, by the name of its length or load. after: steps of the budget that are still taken
    once it is solved, which sharpen what carries over to greater lengths."""

    task: Task
    exams: dict[str, Level]
    pace: Pace
    after: int
    d_model: int

    def recipe(self) -> dict[str, Any]:
        """What two records must share to be comparable."""
        facts = {"d_model": self.d_model, "after": self.after, **asdict(self.pace)}
        return facts | {"goal": asdict(self.task.goal), "exams": list(self.exams)}


def trial(task: Task, pace: Pace, after: int, exams: dict[str, dict[str, int]], d_model: int = 32) -> Trial:
    """exams: how each differs from the task's goal."""
    return Trial(task, {n: replace(task.goal, **changes) for n, changes in exams.items()}, pace, after, d_model)


TRIALS = {
    "parity": trial(
        Parity(40), Pace(1e-2, 1400, 500), 400,
        {"40": {}, "64": {"pairs": 24, "gap": 40}, "128": {"pairs": 64, "gap": 64}, "256": {"pairs": 128, "gap": 128}},
    ),
    "modular_arithmetic": trial(
        ModularArithmetic(20), Pace(1e-2, 1400, 3000), 1000,
        {"39": {}, "79": {"gap": 20}, "159": {"pairs": 40, "gap": 40}, "255": {"pairs": 48, "gap": 80}}, d_model=64,
    ),
    "mqar": trial(
        Mqar(64, pairs=16), Pace(1e-2, 2800, 500), 500,
        {str(p): {"pairs": p, "gap": 2 * p} for p in (4, 8, 16, 24, 32)},
    ),
    "selective_copying": trial(
        SelectiveCopying(8, 128), Pace(1e-2, 2800, 1500), 200,
        {"128": {}, "256": {"gap": 256 - 8}, "512": {"gap": 512 - 8}},
    ),
    "induction": trial(
        Induction(256), Pace(1e-2, 4096, 400), 400,
        {str(T): {"gap": T - 3} for T in (64, 256, 1024, 4096, 16384)},
    ),
    "copy_memory": trial(CopyMemory(200), Pace(5e-3, 2800, 400), 0, {"200": {}}),
}  # fmt: skip
ADDING, ADDING_D_MODEL, ADDING_EXAMS = Lessons(), 32, (100, 200, 400)


def attempt(tell: Tell, name: str, arch: str, seed: int, steps: int | None) -> list[Record]:
    """One architecture, one task, one seed: a record."""
    if name == "adding":
        return [attempt_adding(arch, seed, steps)]
    trial = budgeted(name, steps)
    model = probe_model(arch, trial.task.vocab_size, seed, trial.d_model)
    pupil = Pupil(model, trial.task, seed, trial.pace)
    solved, examples = learn(pupil, trial, tell)
    found = {exam: ask(model, trial.task, level, seed) for exam, level in trial.exams.items()}
    return [
        {
            "kind": name, "arch": arch, "seed": seed, "steps_to_solve": solved, "steps": pupil.steps, "examples": examples,
            "at": {exam: [s.exact, s.n] for exam, s in found.items()},
            "parameters": model.n_parameters(), "state_bytes": model.state_bytes(256), "recipe": trial.recipe(),
        }
    ]  # fmt: skip


def attempt_adding(arch: str, seed: int, steps: int | None) -> Record:
    """The same for the regression: at each length the mean squared error."""
    lessons = replace(ADDING, steps=steps or ADDING.steps)
    model = adder(arch, ADDING_D_MODEL, seed)
    solved = learn_adding(model, lessons, seed)
    exam = torch.Generator().manual_seed(seed + 2)
    return {
        "kind": "adding", "arch": arch, "seed": seed, "steps_to_solve": solved, "steps": solved or lessons.steps,
        "examples": (solved or lessons.steps) * lessons.rows,
        "at": {str(T): error(model, T, exam) for T in ADDING_EXAMS},
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": sum(m.state_bytes(256) for m in model.stack.mixers()), "recipe": recipe("adding", steps),
    }  # fmt: skip


def budgeted(name: str, steps: int | None) -> Trial:
    trial = TRIALS[name]
    return replace(trial, pace=replace(trial.pace, steps=steps or trial.pace.steps))


def recipe(name: str, steps: int | None) -> dict[str, Any]:
    """What a record of this task says of how it was made."""
    if name != "adding":
        return budgeted(name, steps).recipe()
    sizes = {"d_model": ADDING_D_MODEL, "exams": [str(T) for T in ADDING_EXAMS]}
    return asdict(replace(ADDING, steps=steps or ADDING.steps)) | sizes


def learn(pupil: Pupil, trial: Trial, tell: Tell) -> tuple[int | None, int]:
    """Up the ladder until the goal is solved, and some steps more: the steps it took, or None; and the examples seen."""
    solved, examples, until = None, 0, trial.pace.steps or 0
    while pupil.steps < until:
        examples += pupil.study()
        if pupil.steps % LOOK_EVERY:
            continue
        tell(pupil.steps / until, f"{pupil.grasp:.0%} right, {len(pupil.rungs) - 1} rungs below the goal")
        near = len(pupil.rungs) == 1 and pupil.grasp > NEAR
        if solved is None and near and look(pupil, trial.task).accuracy >= SOLVED:
            solved, until = pupil.steps, min(until, pupil.steps + trial.after)
    return solved, examples


@torch.no_grad()
def look(pupil: Pupil, task: Task) -> Score:
    """Fresh questions at the goal."""
    return enough(pupil.examined, task, task.goal, LOOKS, pupil.exam)


@torch.no_grad()
def ask(model: LanguageModel, task: Task, level: Level, seed: int) -> Score:
    """Fresh questions, the same for every architecture."""
    return enough(model.eval(), task, level, ASKED, torch.Generator().manual_seed(seed + 2))


def enough(model: LanguageModel, task: Task, level: Level, wanted: int, generator: torch.Generator) -> Score:
    """That many answers, or as many as the tokens allow."""
    one = task.batch(1, level, torch.Generator())
    length, questions = one.tokens.shape[1], one.asked.shape[1]
    rows = max(FEWEST, min(-(-wanted // questions), ALL_TOKENS // length))
    found, at_once = Score(), max(1, ROW_TOKENS // length)
    for start in range(0, rows, at_once):
        batch = task.batch(min(at_once, rows - start), level, generator)
        found += score(answers(model, batch), batch.answers, batch.planted)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=[*TRIALS, "adding"])
    parser.add_argument("--archs", required=True, help="names or patterns: a,b,c or 'a; 3*b, c; d'")
    parser.add_argument("--seeds", type=int, default=5, help="of each architecture: 0, 1, ... (default: 5)")
    parser.add_argument("--budget", type=int, help="steps of learning (default: the task's own)")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each (default: 1)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of results.jsonl (default: docs/capabilities)")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    archs = separate(chosen.archs)
    for arch in archs:
        parse(arch)
    results = Results(chosen.out)
    with results.claimed():
        return work(results, chosen, archs)


def work(results: Results, chosen: argparse.Namespace, archs: list[str]) -> int:
    """What is not there yet, seed by seed, so that a run that is cut short has something of every architecture."""
    made = recipe(chosen.task, chosen.budget)
    there = {(r["arch"], r["seed"]) for r in results.records() if r["kind"] == chosen.task and r["recipe"] == made}
    wanted = [(arch, seed) for seed in range(chosen.seeds) for arch in archs if (arch, seed) not in there]
    jobs = [Job(f"{a}, seed {s}", attempt, (chosen.task, a, s, chosen.budget), -i) for i, (a, s) in enumerate(wanted)]
    failed = 0
    for event in run_all(jobs, chosen.jobs) if jobs else ():
        if isinstance(event, Done):
            failed += bool(event.failure)
            for record in event.records:
                results.add(record)
            print(f"{event.task.name}: {event.failure or told(event.records[0])}", flush=True)
    return 1 if failed else 0


def told(record: Record) -> str:
    """A record in a line."""
    at = ", ".join(
        f"{exam}: {v[0] / v[1]:.0%}" if isinstance(v, list) else f"{exam}: {v:.2g}" for exam, v in record["at"].items()
    )
    solved = f"solved after {record['steps_to_solve']} steps" if record["steps_to_solve"] else "not solved"
    return f"{solved}; at {at}"


if __name__ == "__main__":
    run(main)  # what is done is kept; the same command goes on from there
