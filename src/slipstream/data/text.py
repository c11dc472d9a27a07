"""Text as a dataset: the first part to train on, the last tenth to validate on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from slipstream.core.dataset import Dataset
from slipstream.core.errors import InputError
from slipstream.data.source import HELD_OUT, read_text
from slipstream.data.store import Tokens, store, tokenize
from slipstream.data.windows import Windows

CONTEXT = 256  # tokens a sequence has when nothing is said and the text is long enough
SHORTEST = 8  # no context below this is chosen for anybody


@dataclass(frozen=True, eq=False)
class TextData(Dataset):
    """name: what a run on it is called. notes: what the user should know of how it was read."""

    name: str
    tokens: Tokens
    context: int
    bytes_per_token: float
    notes: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Tokenizer:
        return self.tokens.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def key(self) -> str:
        """Changes with the text or the tokenizer."""
        return self.tokens.key

    @property
    def tokens_per_sequence(self) -> int:
        return self.context

    @property
    def _cut(self) -> int:
        """Where the held-out part begins: the last tenth, and at least one sequence."""
        total = len(self.tokens.ids)
        return total - max(int(HELD_OUT * total), self.context + 1)

    @property
    def training(self) -> Windows:
        return Windows(self.tokens.ids[: self._cut], self.context)

    @property
    def held_out(self) -> Windows:
        return Windows(self.tokens.ids[self._cut :], self.context)

    def kept_in(self, folder: Path) -> TextData:
        """The same data, its tokens memory-mapped from files in the folder."""
        return replace(self, tokens=store(self.tokens, folder))

    def batch(self, step: int, batch_size: int, seed: int) -> Int[Tensor, "B L"]:
        return self.training.batch(step, batch_size, seed)

    def validation(self, batch_size: int, most: int | None = None) -> Iterator[tuple[Int[Tensor, "B L"], int]]:
        return self.held_out.spread(self.tokens.sizes[self._cut :], batch_size, most)


def text_data(
    source: str | Path | None = None, tokenizer: str = "bytes", context: int | None = None, folder: Path | None = None
) -> TextData:
    """Text from a file, a folder, "-" or the packaged novel (None), as tokens cut into training and validation.

    Without a context it is 256, or what a short text allows (said in notes). folder: where kept_in may have left the
    tokens. Raises InputError when the text is too short.
    """
    text = read_text(source)
    tokens = tokenize(text, tokenizer, folder)
    fitting, notes = _context(text.name, len(tokens.ids), context)
    return TextData(text.name, tokens, fitting, len(text.content) / len(tokens.ids), (*text.notes, *notes))


def _context(name: str, total: int, asked: int | None) -> tuple[int, list[str]]:
    """The context to use: training and validation must each hold one sequence."""
    longest = total // 2 - 1
    wanted = asked or CONTEXT
    if wanted <= longest:
        return wanted, []
    if asked is not None or longest < SHORTEST:
        wanted = asked or SHORTEST
        shorter = f"; or give --context {longest} at most" if longest >= SHORTEST else ""
        raise InputError(
            f"{name} is too short: it has {total} tokens, and context {wanted} needs {2 * (wanted + 1)} "
            f"(one sequence to train on and one to validate on){shorter}"
        )
    return longest, [f"{name} has only {total} tokens: context {longest} instead of {CONTEXT}"]
