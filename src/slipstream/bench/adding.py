r"""The adding problem: a row of random numbers, two of them marked; what is their sum?

    0.3 0.9 0.1 0.7 ...  with marks  0 1 0 1 ...       the answer at the end is 0.9 + 0.7

As in Bai, Kolter & Koltun 2018, arXiv:1803.01271 (after Hochreiter & Schmidhuber 1997): numbers from [0, 1], scored by
the mean squared error; always saying 1 costs 1/6 = 0.167. A regression on numbers, hence no Task, whose rows are tokens. Rows
of all lengths up to the goal are learned from, which is many times sooner than the goal's alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from slipstream.bench.learn import BETAS, WARM_UP
from slipstream.bench.probe_model import D_MODEL, probe_pattern
from slipstream.bench.task import distinct
from slipstream.layers.linear import Linear
from slipstream.models.pattern import layers
from slipstream.models.stack import Stack

LOOK_EVERY, LOOKS = 50, 256  # steps from one look at fresh rows to the next, and rows of one
ASKED = 1024  # rows of the last look


def adding(n: int, length: int, generator: torch.Generator) -> tuple[Float[Tensor, "n T 2"], Float[Tensor, "n"]]:
    """Numbers beside their marks, and the sums of the two that are marked."""
    numbers = torch.rand(n, length, generator=generator)
    marks = torch.zeros_like(numbers).scatter_(1, distinct(n, 2, length, generator), 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1)


class Adder(nn.Module):
    """The layers of a recall probe between a map from (number, mark) and a map to one number."""

    def __init__(self, arch: str, d_model: int = D_MODEL) -> None:
        super().__init__()
        pattern, n_layers = probe_pattern(arch, d_model)
        self.inward = Linear(2, d_model)
        self.stack = Stack(layers(pattern, n_layers), d_model, {})
        self.outward = Linear(d_model, 1)

    def forward(self, rows: Float[Tensor, "n T 2"]) -> Float[Tensor, "n"]:
        return self.outward(self.stack(self.inward(rows))[:, -1])[:, 0]


def adder(arch: str, d_model: int, seed: int) -> Adder:
    """A fresh one; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Adder(arch, d_model)


@dataclass(frozen=True)
class Lessons:
    """length: of the rows of the goal. rows: of one step. solved: mean squared error that is small enough."""

    length: int = 200
    rows: int = 32
    steps: int = 1000
    lr: float = 1e-2
    solved: float = 1e-3


def learn_adding(model: Adder, lessons: Lessons, seed: int) -> int | None:
    """Adam until rows of the goal's length are added well enough: after how many steps, or None."""
    generator, exam = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=lessons.lr, betas=BETAS)
    for step in range(1, lessons.steps + 1):
        length = int(torch.randint(2, lessons.length + 1, (), generator=generator))
        rows, sums = adding(lessons.rows, length, generator)
        F.mse_loss(model(rows), sums).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lessons.lr * min(1.0, step / WARM_UP) * (1 - step / (lessons.steps + 1))
        optimizer.step()
        optimizer.zero_grad()
        if step % LOOK_EVERY == 0 and error(model, lessons.length, exam, LOOKS) < lessons.solved:
            return step
    return None


@torch.no_grad()
def error(model: Adder, length: int, exam: torch.Generator, n: int = ASKED) -> float:
    """Mean squared, on n fresh rows."""
    rows, sums = adding(n, length, exam)
    return float(F.mse_loss(model(rows), sums))
