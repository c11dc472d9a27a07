"""What a recall task is: batches with marked questions, at a level of difficulty, and a ladder of levels up to a goal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """pairs: facts (or characters) to keep, or running answers to give. symbols: how many different keys, and values, are in use.
    gap: most tokens between the last fact and the first question, or before the first running answer; drawn anew for each
    batch while learning."""

    pairs: int
    symbols: int
    gap: int


@dataclass(frozen=True)
class Batch:
    """The answer to the question at a position is the token that would come next. planted: every value in the row, right or not;
    choices: the tokens that can be an answer at this level, and all that the loss and the score look at."""

    tokens: Int[Tensor, "B T"]
    asked: Int[Tensor, "B Q"]
    answers: Int[Tensor, "B Q"]
    planted: Int[Tensor, "B P"]
    choices: Int[Tensor, "V"]


class Task(ABC):
    """Fresh examples without end: the same generator gives the same batches."""

    vocab_size: int
    goal: Level  # solved means 99 % here

    @abstractmethod
    def batch(self, n: int, level: Level, generator: torch.Generator) -> Batch:
        """n rows with exactly this level's gap."""

    def drawn(self, rung: Level, generator: torch.Generator) -> Level:
        """The level of the next batch on this rung: a gap from none to its most."""
        return replace(rung, gap=int(torch.randint(rung.gap + 1, (), generator=generator)))

    def ladder(self) -> list[Level]:
        """From two facts out of a handful, over half the facts, to the goal: what finds a fact is learned many times sooner where
        there are few symbols to tell apart, and carries over."""
        goal = self.goal
        first = replace(goal, pairs=min(2, goal.pairs), symbols=min(8, goal.symbols))
        return [first, replace(goal, pairs=(goal.pairs + 1) // 2), goal]


def distinct(n: int, count: int, out_of: int, generator: torch.Generator) -> Int[Tensor, "n count"]:
    """n rows of `count` different numbers below `out_of`, in random order."""
    return torch.rand(n, out_of, generator=generator).topk(count).indices
