r"""Multi-query associative recall: pairs first, then each key once more at a distance from a power law.

    k1 v1 k2 v2 ... kP vP  0 0 k2 0 0 0 k1 ...       the answer at k2 is v2

As Arora et al. 2023, arXiv:2312.04927, appendix E.1 and the authors' code: distances i with probability proportional to
a i^(a-1), a = 0.01, blanks elsewhere, and no answer shown. The vocabulary here is small, which is easier than the paper's 8,192.
"""

from __future__ import annotations

import torch

from slipstream.bench.task import Batch, Level, Task, distinct

POWER = 0.01
BLANK = 0


class Mqar(Task):
    """n_symbols keys with n_symbols possible values, and a blank."""

    def __init__(self, n_symbols: int = 64, pairs: int = 6) -> None:
        self.n_symbols, self.vocab_size = n_symbols, 1 + 2 * n_symbols
        self.goal = Level(pairs=pairs, symbols=n_symbols, gap=2 * pairs)

    def batch(self, n: int, level: Level, generator: torch.Generator) -> Batch:
        P, places = level.pairs, level.pairs + level.gap // 2
        keys = 1 + distinct(n, P, level.symbols, generator)
        values = 1 + self.n_symbols + distinct(n, P, level.symbols, generator)
        asked = 2 * P + 2 * _power_law(n, P, places, generator)
        tokens = torch.full((n, 2 * P + 2 * places), BLANK)
        tokens[:, : 2 * P] = torch.stack([keys, values], 2).flatten(1)
        tokens.scatter_(1, asked, keys)
        choices = 1 + self.n_symbols + torch.arange(level.symbols)
        return Batch(tokens, asked, values, values, choices)


def _power_law(n: int, count: int, places: int, generator: torch.Generator) -> torch.Tensor:
    """n rows of `count` different places, near ones more often: the largest of log p plus Gumbel noise."""
    log_p = (POWER - 1) * torch.arange(1, places + 1).log()
    gumbel = -(-torch.rand(n, places, generator=generator).clamp_min(1e-12).log()).log()
    return (log_p + gumbel).topk(count).indices
