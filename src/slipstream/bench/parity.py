r"""Parity: after every bit, is the number of ones so far odd?

    1 0 0 1 1 ...       the answers are  1 1 1 0 1 ...

Two states, which every bit may swap. Linear recurrences whose state is multiplied by positive numbers cannot do it at any length
in finite precision (proved by Grazzi et al. 2024, arXiv:2411.12537); one factor of -1 can. The paper asks at the end of a
string only; here every prefix is asked about, which is learned many times sooner and is as hard at each length.
"""

from __future__ import annotations

import torch

from slipstream.bench.task import Batch, Level, Task


class Parity(Task):
    """level.gap bits, then level.pairs bits with a question at each."""

    vocab_size = 2

    def __init__(self, length: int = 40) -> None:
        self.goal = Level(pairs=length, symbols=2, gap=0)

    def batch(self, n: int, level: Level, generator: torch.Generator) -> Batch:
        bits = torch.randint(2, (n, level.gap + level.pairs), generator=generator)
        asked = (level.gap + torch.arange(level.pairs)).expand(n, -1)
        answers = bits.cumsum(1).remainder(2)[:, level.gap :]
        return Batch(bits, asked, answers, answers, torch.arange(2))
