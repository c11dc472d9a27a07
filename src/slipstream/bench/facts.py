r"""Facts planted in the user's own text: a key and its value somewhere in it, and questions after it.

    ... text KEY VALUE text text KEY VALUE te ... xt <gap of text> KEY VALUE KEY VALUE ...
                                                               ^question   ^question

Text is read as bytes; keys and values are tokens of their own beside the 256 bytes, so they cannot be guessed from the text and
a value that was planted under another key can be told from one that was not planted at all. After a question stands its answer,
as it would in text, so one miss does not confuse the next question.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from slipstream.bench.task import Batch, Level, Task, distinct
from slipstream.core.errors import InputError

BYTES = 256
SPREAD = 4  # tokens of text and facts over which each pair is spread: two of text for every two of a fact


class Facts(Task):
    """n_symbols keys with n_symbols possible values."""

    def __init__(self, text: bytes | np.ndarray, n_symbols: int = 64) -> None:
        if not len(text):
            raise InputError("facts are planted in a text, and this one is empty (0 bytes)")
        raw = np.frombuffer(text, dtype=np.uint8) if isinstance(text, bytes) else text
        self.text = torch.from_numpy(raw.astype(np.int64))
        self.n_symbols, self.vocab_size = n_symbols, BYTES + 2 * n_symbols
        self.goal = Level(pairs=6, symbols=n_symbols, gap=12)

    def batch(self, n: int, level: Level, generator: torch.Generator, updates: bool = False) -> Batch:
        """updates: every key is planted a second time with another value, after all firsts; the last value is the answer."""
        P = level.pairs
        keys, values = distinct(n, P, level.symbols, generator), distinct(n, P, level.symbols, generator)
        if updates:
            keys = torch.cat([keys, keys], 1)
            values = torch.cat([values, values.roll(1, 1) if P > 1 else (values + 1) % level.symbols], 1)
        return self._row(keys + BYTES, values + BYTES + self.n_symbols, P, level, generator)

    def _row(
        self, keys: Int[Tensor, "B N"], values: Int[Tensor, "B N"], P: int, level: Level, generator: torch.Generator
    ) -> Batch:
        """Text with all pairs in the order given, then the last P pairs as questions in random order."""
        (n, planted), room = keys.shape, SPREAD * keys.shape[1]
        order = torch.rand(n, P, generator=generator).argsort(1) + planted - P
        tokens = self._passages(n, room + level.gap + 2 * P, generator)
        at = torch.randint(room - 2 * planted + 1, (n, planted), generator=generator).sort(1).values
        at = at + 2 * torch.arange(planted)
        asked = (room + level.gap + 2 * torch.arange(P)).expand(n, -1)
        for places, pairs in ((at, (keys, values)), (asked, (keys.gather(1, order), values.gather(1, order)))):
            for i, symbols in enumerate(pairs):
                tokens.scatter_(1, places + i, symbols)
        choices = BYTES + self.n_symbols + torch.arange(level.symbols)
        return Batch(tokens, asked, values.gather(1, order), values, choices)

    def _passages(self, n: int, length: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        """Pieces of the text from random places, going round when it is short."""
        start = torch.randint(len(self.text), (n, 1), generator=generator)
        return self.text[(start + torch.arange(length)) % len(self.text)]
