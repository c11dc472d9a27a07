r"""Copying: a random string, a separator, and the string again.

    s1 s2 ... sP  0 0 0  |  s1 s2 ... sP-1       the answer at | is s1, at s1 it is s2, ...

As Jelassi et al. 2024, arXiv:2402.01032: exact copying needs memory in proportion to the string, which a growing cache has and a
fixed state has not. Scored by character.
"""

from __future__ import annotations

import torch

from slipstream.bench.task import Batch, Level, Task

BLANK, SEPARATOR, FIRST = 0, 1, 2


class Copying(Task):
    """Strings over n_symbols letters, drawn one by one, so that letters repeat."""

    def __init__(self, n_symbols: int = 26) -> None:
        self.vocab_size = FIRST + n_symbols
        self.goal = Level(pairs=16, symbols=n_symbols, gap=0)

    def batch(self, n: int, level: Level, generator: torch.Generator) -> Batch:
        P = level.pairs
        string = FIRST + torch.randint(level.symbols, (n, P), generator=generator)
        tokens = torch.full((n, 2 * P + level.gap), BLANK)
        tokens[:, :P] = string
        tokens[:, P + level.gap] = SEPARATOR
        tokens[:, P + level.gap + 1 :] = string[:, :-1]
        asked = (P + level.gap + torch.arange(P)).expand(n, -1)
        return Batch(tokens, asked, string, string, FIRST + torch.arange(level.symbols))
