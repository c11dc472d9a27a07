"""Learning a recall task: from few symbols and pairs up a ladder to the goal, on examples that are never seen twice."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from slipstream.bench.probe_model import answer_logits, answer_loss, answers
from slipstream.bench.scoring import Score, score
from slipstream.bench.task import Level, Task
from slipstream.models.language_model import LanguageModel

BETAS, WARM_UP = (0.9, 0.99), 20
COOLING = 0.5  # share of the rate that is taken away as the goal is reached
AVERAGED = 0.95  # the model that is examined is a running mean of the one that learns: a steep rate, without its noise
CLIMB, SOLVED = 0.8, 0.99  # accuracy for the next rung of the ladder, and at the goal
LOOK_EVERY = 20  # steps from one look at the goal to the next
LOOKS = 1024  # answers of one look

Tell = Callable[[float, str], None]  # share of the time that is used, what is going on


@dataclass(frozen=True)
class Pace:
    """lr: the full rate. tokens: of one batch; short sequences come in larger batches. steps: over which the rate falls to
    nothing, where their number is known beforehand."""

    lr: float = 1e-2
    tokens: int = 1400
    steps: int | None = None


@dataclass
class Learned:
    """examples_to_solve: seen when 99 % of fresh questions were answered, or None. curve: (examples, accuracy at the goal)."""

    examples_to_solve: int | None = None
    examples: int = 0
    seconds: float = 0.0
    accuracy: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)


def learn(
    model: LanguageModel, task: Task, seconds: float, seed: int, on_progress: Tell = lambda share, text: None
) -> Learned:
    """Train the model until the goal is solved or the time is up; which examples come is the seed's alone."""
    start, pupil, done = time.perf_counter(), Pupil(model, task, seed), Learned()
    while done.examples_to_solve is None and done.seconds < seconds:
        done.examples += pupil.study()
        if pupil.steps % LOOK_EVERY == 0:
            done.accuracy = pupil.examine().accuracy
            done.curve.append((done.examples, done.accuracy))
            done.examples_to_solve = done.examples if done.accuracy >= SOLVED else None
        done.seconds = time.perf_counter() - start
        on_progress(min(1.0, done.seconds / seconds), f"{done.accuracy:.0%} recalled after {done.examples:,} examples")
    if pupil.steps % LOOK_EVERY:
        done.accuracy = pupil.examine().accuracy
        done.curve.append((done.examples, done.accuracy))
    return done


class Pupil:
    """A model on its way up the ladder. examined: what `learn` gives back. grasp: running accuracy on this rung."""

    def __init__(self, model: LanguageModel, task: Task, seed: int, pace: Pace = Pace()) -> None:
        self.examined, self.model, self.task, self.pace = model, copy.deepcopy(model), task, pace
        self.generator = torch.Generator().manual_seed(seed)
        self.exam = torch.Generator().manual_seed(seed + 1)
        self.rungs, self.steps, self.grasp = task.ladder(), 0, 0.0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=pace.lr, betas=BETAS, weight_decay=0.0)

    def study(self) -> int:
        """One step on the rung at hand; the number of examples it took."""
        level = self.task.drawn(self.rungs[0], self.generator)
        n = max(8, self.pace.tokens // _length(self.task, level))
        batch = self.task.batch(n, level, self.generator)
        logits = answer_logits(self.model, batch)
        answer_loss(logits, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._set_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self._average()
        self._climb(score(batch.choices[logits.argmax(-1)], batch.answers, batch.planted).accuracy)
        return n

    @torch.no_grad()
    def _average(self) -> None:
        for mean, now in zip(self.examined.parameters(), self.model.parameters()):
            mean.lerp_(now, 1 - AVERAGED)

    def _climb(self, accuracy: float) -> None:
        self.grasp += 0.2 * (accuracy - self.grasp)
        if self.grasp > CLIMB and len(self.rungs) > 1:
            del self.rungs[0]
            self.grasp = 0.0

    def _set_rate(self) -> None:
        """Warm-up; then the full rate, cooling as the goal comes near, and as the steps run out."""
        near = self.grasp**2 if len(self.rungs) == 1 else 0.0
        left = 1 - self.steps / self.pace.steps if self.pace.steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.pace.lr * min(1.0, (self.steps + 1) / WARM_UP) * left * (1 - COOLING * near)

    @torch.no_grad()
    def examine(self) -> Score:
        """Fresh questions at the goal."""
        goal, found = self.task.goal, Score()
        while found.n < LOOKS:
            batch = self.task.batch(64, goal, self.exam)
            found += score(answers(self.examined, batch), batch.answers, batch.planted)
        return found


def _length(task: Task, level: Level) -> int:
    return task.batch(1, level, torch.Generator()).tokens.shape[1]
