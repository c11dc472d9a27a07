r"""Induction heads, with a special token: what stood behind it when it was last seen?

    a c b ! d a b ... c !       the answer at the last ! is d

As in Fu et al. 2022, arXiv:2212.14052, and Gu & Dao 2023, arXiv:2312.00752, section 4.1 and appendix E: random
letters, the special token once at a random place, and again as the last. Learned at length 256, asked at lengths far beyond.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from slipstream.bench.task import Batch, Level, Task

SPECIAL, FIRST = 0, 1


class Induction(Task):
    """One special token and its letter somewhere in level.gap others."""

    def __init__(self, length: int = 256, n_symbols: int = 15) -> None:
        self.vocab_size = FIRST + n_symbols
        self.goal = Level(pairs=1, symbols=n_symbols, gap=length - 3)

    def batch(self, n: int, level: Level, generator: torch.Generator) -> Batch:
        T = level.gap + 3
        tokens = FIRST + torch.randint(level.symbols, (n, T), generator=generator)
        place = torch.randint(T - 2, (n, 1), generator=generator)
        tokens.scatter_(1, place, SPECIAL)
        tokens[:, -1] = SPECIAL
        answers = tokens.gather(1, place + 1)
        return Batch(tokens, torch.full((n, 1), T - 1), answers, answers, FIRST + torch.arange(level.symbols))

    def ladder(self) -> list[Level]:
        """From a sixteenth of the length: what finds the token is learned sooner where there is less to search."""
        goal = self.goal
        return [replace(goal, gap=goal.gap // 16), replace(goal, gap=goal.gap // 4), goal]
