"""The training loop as an iterator: it computes and yields; it prints nothing and writes nothing.

    for point in Trainer(model, data, recipe).run():
        print(point.tokens, point.bits_per_byte, point.validation)

Everything a step does follows from the weights, the optimiser's state and the step number (batches and random numbers
are functions of (seed, step)), so a trainer that is restored goes on bit for bit. With a budget of time the learning
rate follows the clock, and no two runs are the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.core.auxiliary import Collector
from slipstream.core.dataset import Dataset
from slipstream.core.errors import InputError
from slipstream.core.objective import Objective, bits_per_byte
from slipstream.models.language_model import LanguageModel
from slipstream.objectives.next_token import NextToken
from slipstream.train.config import Recipe
from slipstream.train.experts import Use, Watch, told
from slipstream.train.lessons import losses, shortened
from slipstream.train.optim import Optimizers
from slipstream.train.schedule import lr_share

EVALUATIONS = 10  # in a run that does not say how many
EVALUATION_TOKENS = 32768  # held-out tokens of one, at most, unless the recipe says
LAST_EVALUATION = 16  # times as many held-out tokens as one on the way
LOADS = 100  # times in a run that the load of experts is told


@dataclass(frozen=True)
class Point:
    """A step that was made. seconds: of training alone, validations and checkpoints not counted."""

    step: int  # steps made
    tokens: int  # tokens trained on so far
    seconds: float
    loss: float  # nats a token of this step's batch, before the step
    bits_per_byte: float  # the same, for tokens of average length
    lr: float
    grad_norm: float
    done: float  # share of the run
    validation: float | None = None  # bits per byte of the held-out text, when it was measured
    experts: dict[str, Use] | None = None  # of mixtures of experts, by layer; a hundred times in a run
    lessons: dict[str, float] | None = None  # losses of parts that only choose, by layer, in nats; as often
    warnings: list[str] | None = None  # what the user should know of this step


class Trainer:
    """Trains a model on data. step and seconds are where it stands."""

    def __init__(self, model: LanguageModel, data: Dataset, recipe: Recipe, objective: Objective | None = None) -> None:
        if (how := model.config.quantisation) is not None:
            raise InputError(
                f"a model quantised to {how.to} cannot be trained: its weights are whole numbers. Train the model it was "
                "made from, and quantise that again"
            )
        self.model, self.data, self.recipe = model, data, recipe
        self.objective = objective or NextToken()
        self.optimizers = Optimizers(model, recipe)
        self.device = next(model.parameters()).device
        self.step, self.seconds = 0, 0.0
        self.collector, self.watch = Collector(), Watch()

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch_size * self.data.tokens_per_sequence

    @property
    def total_steps(self) -> float:
        """Steps of the run; infinite when only time ends it."""
        steps = self.recipe.most_tokens / self.tokens_per_step
        return max(1, math.ceil(steps)) if steps < math.inf else steps

    @property
    def done(self) -> float:
        return self._share(self.step)

    @property
    def finished(self) -> bool:
        return self.done >= 1

    def _share(self, step: float) -> float:
        by_time = self.seconds / self.recipe.budget if self.recipe.budget else 0.0
        return max(step / self.total_steps, by_time)

    def run(self) -> Iterator[Point]:
        """One point a step until the run is finished."""
        while not self.finished:
            yield self.advance()

    def advance(self) -> Point:
        """Make one step, and measure the validation loss when it is due."""
        before, started = self.done, time.perf_counter()
        lr = self.recipe.highest_lr * lr_share(min(1.0, self._share(self.step + 0.5)), self.recipe)
        loss = self._gradients()
        norm = shortened(self.model, self.collector, self.recipe.grad_clip)
        self._refuse_nonsense(loss, norm, lr)
        self.optimizers.step(lr)
        self.collector.settle()
        self.step += 1
        self.seconds += time.perf_counter() - started
        return Point(
            step=self.step,
            tokens=self.step * self.tokens_per_step,
            seconds=self.seconds,
            loss=loss,
            bits_per_byte=bits_per_byte(loss, self.data.bytes_per_token),
            lr=lr,
            grad_norm=norm,
            done=min(1.0, self.done),
            validation=self.evaluate() if self._evaluation_is_due(before) else None,
            experts=told(self.model, self.collector) if self._is_due(before, LOADS) else None,
            lessons=losses(self.model, self.collector) if self._is_due(before, LOADS) else None,
            warnings=self.watch.look(self.model, self.collector) or None,
        )

    def _gradients(self) -> float:
        """Gradients of this step's mean loss, part by part, and of what mixers ask for beside it; returns the loss."""
        batch = self.data.batch(self.step, self.recipe.batch_size, self.recipe.seed).to(self.device)
        random = torch.Generator(self.device).manual_seed((self.recipe.seed * 2**32 + self.step) % 2**63)
        total = torch.zeros((), device=self.device)
        self.collector = Collector()
        for part in batch.chunk(self.recipe.grad_accumulation):
            with self._precision(), self.collector.listening():
                loss = self.objective.loss(self.model, part, random)
            mean = loss.mean / self.recipe.grad_accumulation
            (mean + self.collector.penalty() / self.recipe.grad_accumulation).backward()
            total += mean.detach()
        return total.item()

    def _precision(self) -> AbstractContextManager:
        auto = self.recipe.precision == "auto" and self.device.type == "cuda"
        if auto or self.recipe.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _refuse_nonsense(self, loss: float, norm: float, lr: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"training broke down at step {self.step + 1}: loss {loss}, gradient norm {norm}, learning rate "
                f"{lr:.2g}; try --lr {self.recipe.highest_lr / 3:.1g}, a longer --warmup or --precision float32"
            )

    def _evaluation_is_due(self, before: float) -> bool:
        if self.recipe.eval_every and not self.finished:
            return self.step % self.recipe.eval_every == 0
        return self._is_due(before, EVALUATIONS)

    def _is_due(self, before: float, times: int) -> bool:
        """Whether this step ends another of so many parts of the run, or the run."""
        return self.finished or int(self.done * times) > int(before * times)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per byte of the held-out text: the same sequences every time, and many more of them when finished."""
        wanted = self.recipe.eval_tokens or min(EVALUATION_TOKENS, self.recipe.most_tokens / 100)
        most = max(1, int(wanted * (LAST_EVALUATION if self.finished else 1)) // self.data.tokens_per_sequence)
        rows = max(1, self.recipe.batch_size // self.recipe.grad_accumulation)
        nats, n_bytes = 0.0, 0
        for batch, covered in self.data.validation(rows, most):
            random = torch.Generator(self.device).manual_seed(n_bytes)
            with self._precision():
                nats += self.objective.loss(self.model, batch.to(self.device), random).nats.item()
            n_bytes += covered
        return bits_per_byte(nats, n_bytes)

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, but for `step` and `seconds`."""
        return {f"model.{n}": t for n, t in _weights(self.model).items()} | {
            f"optimizer.{n}": t for n, t in self.optimizers.tensors().items()
        }

    def restore(self, tensors: dict[str, Tensor], step: int, seconds: float) -> None:
        """Stand where another trainer of the same model, data and recipe stood."""
        for name, weight in _weights(self.model).items():
            weight.copy_(tensors[f"model.{name}"])
        kept = {n.removeprefix("optimizer."): t for n, t in tensors.items() if n.startswith("optimizer.")}
        self.optimizers.restore(kept)
        self.step, self.seconds = step, seconds


def _weights(model: LanguageModel) -> dict[str, Tensor]:
    """Parameters and buffers that are kept, each once however many names it has."""
    unique: dict[int, str] = {}
    kept = model.state_dict()
    return {n: t for n, t in kept.items() if unique.setdefault(t.data_ptr(), n) == n}
