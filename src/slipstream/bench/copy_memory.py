r"""Copy memory: ten digits, a long silence, a signal, and the digits again.

    d1 ... d10  0 0 ... 0  9 9 ... 9       the answers at the last ten 9 are d1 ... d10

As in Bai, Kolter & Koltun 2018, arXiv:1803.01271 (after Hochreiter & Schmidhuber 1997 and Arjovsky et al. 2016): T - 1
zeros and eleven signals, of which the first is not asked at. The silence has the same length in every example, so that a
convolution that reaches back far enough can copy by counting.
"""

from __future__ import annotations

import torch

from slipstream.bench.task import Batch, Level, Task

BLANK, FIRST, SIGNAL = 0, 1, 9


class CopyMemory(Task):
    """level.pairs digits, level.gap zeros (the paper's T - 1), level.pairs + 1 signals."""

    vocab_size = 10

    def __init__(self, silence: int = 200, digits: int = 10) -> None:
        self.goal = Level(pairs=digits, symbols=8, gap=silence - 1)

    def batch(self, n: int, level: Level, generator: torch.Generator) -> Batch:
        P = level.pairs
        digits = FIRST + torch.randint(level.symbols, (n, P), generator=generator)
        tokens = torch.full((n, 2 * P + level.gap + 1), BLANK)
        tokens[:, :P] = digits
        tokens[:, P + level.gap :] = SIGNAL
        asked = (P + level.gap + 1 + torch.arange(P)).expand(n, -1)
        return Batch(tokens, asked, digits, digits, FIRST + torch.arange(level.symbols))

    def drawn(self, rung: Level, generator: torch.Generator) -> Level:
        """The silence is never shorter."""
        return rung

    def ladder(self) -> list[Level]:
        """The goal alone, as in the paper: what is copied by counting does not carry over."""
        return [self.goal]
