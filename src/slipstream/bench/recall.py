r"""The recall probe: does an architecture still find a fact that was planted far back in the user's own text?

A model trained for minutes on prose has not learned to look things up, so each architecture gets a small two-layer model that is
taught to, on short passages of the text. It is then asked about facts much further back, and about many more facts at once, than
it was taught with. What it shows is what the mixer's memory can do, not how well a large model of it would be trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from slipstream.bench.facts import Facts
from slipstream.bench.learn import Tell, learn
from slipstream.bench.probe_model import answers, probe_model
from slipstream.bench.scoring import Score, score
from slipstream.bench.task import Batch, Level
from slipstream.models.language_model import LanguageModel

DISTANCES = (64, 256, 1024, 4096)  # tokens of text between the last fact and the first question
LOADS = (4, 8, 16, 32, 64)  # facts at once
ANSWERS = 300  # wanted at every point: the interval is then at most 11 % wide
LEARNING = 0.7  # share of the time; the rest is for the questions
ROW_TOKENS = 65536  # read at once: bounds memory


@dataclass(frozen=True)
class Point:
    """One thing to ask about. weight: its share of the time for questions."""

    kind: str
    at: dict[str, int]
    level: Level
    weight: float
    updates: bool = False


def recall_probe(
    arch: str,
    text: bytes | np.ndarray,
    seconds: float = 30.0,
    seed: int = 0,
    on_progress: Tell = lambda share, text: None,
) -> dict[str, Any]:
    """Teach a small model of this architecture to look facts up, then ask. Gives a record of kind "recall".

    seconds: of one core, for all of it; fewer answers are asked for where they run out (n says how many). Call it with one
    thread: such small models are slower on two.
    """
    task, start = Facts(text), time.perf_counter()
    model = probe_model(arch, task.vocab_size, seed)
    learned = learn(model, task, LEARNING * seconds, seed, lambda share, said: on_progress(LEARNING * share, said))
    record: dict[str, Any] = {
        "kind": "recall", "arch": arch, "seed": seed, "examples_to_solve": learned.examples_to_solve,
        "examples": learned.examples, "seconds": learned.seconds, "accuracy": learned.accuracy,
        "curve": [list(point) for point in learned.curve], "distance": [], "load": [],
        "state_bytes": model.state_bytes(max(DISTANCES)),
    }  # fmt: skip
    for point, found in ask(model, task, points(task), start + seconds, seed):
        answered = point.at | found.record()
        if point.kind == "overwritten":
            record["overwritten"] = answered
        else:
            record[point.kind].append(answered)
        on_progress(
            min(1.0, (time.perf_counter() - start) / seconds), f"asking: {point.kind} {next(iter(point.at.values()))}"
        )
    return record


def points(task: Facts) -> list[Point]:
    """What is asked about: facts further and further back, more and more facts, and facts that were changed."""
    goal = task.goal
    far = [Point("distance", {"distance": d}, replace(goal, gap=d), 1 + d / 512) for d in DISTANCES]
    full = [Point("load", {"pairs": n}, replace(goal, pairs=n), 1 + n / 32) for n in LOADS if n <= goal.symbols]
    return [*full, Point("overwritten", {"pairs": goal.pairs}, goal, 1, updates=True), *far]


@torch.no_grad()
def ask(
    model: LanguageModel, task: Facts, points: list[Point], until: float, seed: int
) -> Iterator[tuple[Point, Score]]:
    """Each point's answers: ANSWERS of them, or what its share of the time allows, and one batch at least."""
    model.eval()
    for i, point in enumerate(points):
        now = time.perf_counter()
        share = point.weight / sum(p.weight for p in points[i:])
        batches = _fresh(task, point, torch.Generator().manual_seed(seed + 2))
        found = Score()
        while found.n == 0 or (found.n < ANSWERS and time.perf_counter() < now + share * max(0.0, until - now)):
            batch = next(batches)
            found += score(answers(model, batch), batch.answers, batch.planted)
        yield point, found


def _fresh(task: Facts, point: Point, generator: torch.Generator) -> Iterator[Batch]:
    length = 6 * point.level.pairs * (1 + point.updates) + point.level.gap
    n = max(1, min(128, ROW_TOKENS // length, -(-ANSWERS // point.level.pairs)))
    while True:
        yield task.batch(n, point.level, generator, point.updates)
