r"""Selective copying: letters strewn among blanks at random, to be written down in order at the end.

    . c . . a . b .  | | |       the answers at the three | are  c a b

As in Gu & Dao 2023, arXiv:2312.00752, section 4.1 and appendix E.1 (and Jing et al. 2019): letters out of 14 at random places
among blanks, then as many markers (the paper has 16 letters in 4096 places). The spacing varies, so that a filter whose
weights are the same for every input (a convolution, S4) cannot find them by counting. No answer is shown.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from slipstream.bench.task import Batch, Level, Task, distinct

BLANK, MARKER, FIRST = 0, 1, 2


class SelectiveCopying(Task):
    """level.pairs letters among level.gap blanks."""

    def __init__(self, letters: int = 8, length: int = 128, n_symbols: int = 14) -> None:
        self.vocab_size = FIRST + n_symbols
        self.goal = Level(pairs=letters, symbols=n_symbols, gap=length - letters)

    def batch(self, n: int, level: Level, generator: torch.Generator) -> Batch:
        P, context = level.pairs, level.pairs + level.gap
        letters = FIRST + torch.randint(level.symbols, (n, P), generator=generator)
        places = distinct(n, P, context, generator).sort(1).values
        tokens = torch.full((n, context + P), BLANK)
        tokens[:, context:] = MARKER
        tokens.scatter_(1, places, letters)
        asked = (context + torch.arange(P)).expand(n, -1)
        return Batch(tokens, asked, letters, letters, FIRST + torch.arange(level.symbols))

    def ladder(self) -> list[Level]:
        """From a few letters close together: short rows are many, and say where the next letter is."""
        goal = self.goal
        short = [replace(goal, pairs=-(-goal.pairs // n), gap=goal.gap // (4 * n)) for n in (4, 2, 1)]
        return [*short, goal]
