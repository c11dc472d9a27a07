"""Several prompts of different lengths at once. A row's text is the one it would get alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slipstream.core.errors import InputError
from slipstream.generate.config import Sampling
from slipstream.generate.reading import read, start, write
from slipstream.generate.stream import encode, new_seed, next_tokens, tokenizer_of
from slipstream.generate.text import RECENT, Characters, StopStrings
from slipstream.models.captured_step import CapturedStep
from slipstream.models.language_model import LanguageModel


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[str],
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
    chunk: int = 512,
) -> list[str]:
    """The continuation of each prompt. Row i is generate(model, prompts[i], seed=seed + i)."""
    how = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    ids = [encode(model, p) for p in prompts]
    if empty := [i for i, row in enumerate(ids) if not row]:
        raise InputError(f"prompt {empty[0]} is empty: give at least one character to go on from")
    first = new_seed() if seed is None else seed
    rows = [Row(model, row, [stop] if isinstance(stop, str) else stop, first + i) for i, row in enumerate(ids)]
    tokens, lengths = _padded(ids, next(model.parameters()).device)
    reading, alive, step = read(model, start(model, len(rows)), tokens, lengths, chunk), rows, CapturedStep(model)
    for _ in range(max_new_tokens):
        new = next_tokens(reading, how, [r.seed for r in alive])
        for row, token in zip(alive, new.tolist()):
            row.feed(token)
        going = [i for i, r in enumerate(alive) if not r.stops.ended]
        if not going:
            break
        if len(going) < len(alive):
            index = torch.tensor(going, device=new.device)
            reading, new, alive = reading.rows(index), new[index], [alive[i] for i in going]
        reading = write(step, reading, new)
    return [r.text + r.stops.flush() for r in rows]


class Row:
    """One prompt's text as it grows."""

    def __init__(self, model: LanguageModel, prompt: list[int], stops: Sequence[str], seed: int) -> None:
        self.ends = model.conventions.eos_ids
        self.characters, self.stops = Characters(tokenizer_of(model), prompt[-RECENT:]), StopStrings(stops)
        self.seed, self.text = seed, ""

    def feed(self, token: int) -> None:
        if token in self.ends:
            self.stops.ended = True
            return
        self.text += self.stops.feed(self.characters.feed(token))


def _padded(ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B T) right-padded with zeros, and the lengths."""
    rows = [torch.tensor(row, device=device) for row in ids]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(r) for r in ids], device=device)
