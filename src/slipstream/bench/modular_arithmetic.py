r"""Modular arithmetic without brackets: after every number, what is the value so far, modulo 5?

    3 + 4 * 2 - 1 ...       the answers at the numbers are  3 2 1 0 ...

Products are taken before sums, as in Deletang et al. 2022, arXiv:2207.02098, and Grazzi et al. 2024, arXiv:2411.12537, section 5:
the state is a sum and a running product, 25 in all, and multiplying by 0 forgets one of them. The papers ask at the end of an
expression only; here every prefix is asked about.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from slipstream.bench.task import Batch, Level, Task

MODULUS = 5
PLUS, MINUS, TIMES = range(MODULUS, MODULUS + 3)


class ModularArithmetic(Task):
    """level.gap numbers, then level.pairs numbers with a question at each; an operator before every number but the first."""

    vocab_size = MODULUS + 3

    def __init__(self, numbers: int = 20) -> None:
        self.goal = Level(pairs=numbers, symbols=MODULUS, gap=0)

    def batch(self, n: int, level: Level, generator: torch.Generator) -> Batch:
        count = level.gap + level.pairs
        numbers = torch.randint(level.symbols, (n, count), generator=generator)
        operators = torch.randint(PLUS, TIMES + 1, (n, count), generator=generator)
        tokens = torch.stack([operators, numbers], 2).flatten(1)[:, 1:]
        asked = 2 * (level.gap + torch.arange(level.pairs)).expand(n, -1)
        answers = values(numbers, operators)[:, level.gap :]
        return Batch(tokens, asked, answers, answers, torch.arange(MODULUS))

    def ladder(self) -> list[Level]:
        """All five numbers from the start."""
        goal = self.goal
        return [replace(goal, pairs=min(goal.pairs, n)) for n in (3, 6, 10)] + [goal]


def values(numbers: Int[Tensor, "n count"], operators: Int[Tensor, "n count"]) -> Int[Tensor, "n count"]:
    """The value of each prefix. The first operator is before the first number, and counts as a plus."""
    total, product = torch.zeros_like(numbers[:, 0]), numbers[:, 0]
    found = [product]
    for number, operator in zip(numbers.T[1:], operators.T[1:]):
        times = operator == TIMES
        total = torch.where(times, total, total + product)
        product = torch.where(times, product * number, torch.where(operator == MINUS, -number, number)) % MODULUS
        found.append((total + product) % MODULUS)
    return torch.stack(found, 1)
