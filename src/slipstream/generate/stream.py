"""One text or list of tokens, continued token by token.

    for piece in generate(model, "Once upon"):
        print(piece, end="", flush=True)

Memory is that of the model's state, however long it goes on.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.state import State
from slipstream.generate.config import Sampling
from slipstream.generate.reading import Reading, read, start, write
from slipstream.generate.sampling import draw, probabilities
from slipstream.generate.text import RECENT, Characters, StopStrings
from slipstream.models.captured_step import CapturedStep
from slipstream.models.language_model import LanguageModel

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


def generate(
    model: LanguageModel,
    prompt: Prompt = "",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] | Sequence[int] = (),
    seed: int | None = None,
    state: Reading | State | None = None,
    chunk: int = 512,
) -> Stream:
    """Pieces of text when the prompt is text, token ids when it is token ids. temperature 0 is greedy.

    prompt: also messages, [{"role": "user", "content": "Hello"}], which become text by the model's chat template. stop: texts
    (or token ids) that end it and are not given out; so do tokens that end a text by the model's own conventions. state: a
    Reading to continue from, as the stream's own `reading` is, or a bare model state. The same seed gives the same text.
    Raises InputError for what cannot be used.
    """
    how = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    begun = state.clone() if isinstance(state, Reading) else start(model, 1, state and state.clone())
    ids = encode(model, prompt, begins=state is None)
    if not ids and not isinstance(state, Reading):
        raise InputError("the prompt is empty: give at least one character to go on from")
    stops = [stop] if isinstance(stop, str) else list(stop)
    seed = new_seed() if seed is None else seed
    return Stream(
        model, begun, ids, how, max_new_tokens, stops, seed, chunk, as_text=isinstance(prompt, str) or _is_chat(prompt)
    )


class Stream(Iterator[str | int]):
    """What generate gives: an iterator that can say where it stands. n_tokens: written so far. ended: why it ended."""

    def __init__(
        self,
        model: LanguageModel,
        begun: Reading,
        ids: list[int],
        how: Sampling,
        most: int,
        stops: list,
        seed: int,
        chunk: int,
        as_text: bool,
    ) -> None:
        self.model, self.how, self.most, self.seed, self.chunk = model, how, most, seed, chunk
        self.n_tokens, self.ended = 0, ""
        self._reading, self._prompt, self._step = begun, ids, CapturedStep(model)
        self._unread: Tensor | None = None  # the token written last, while the model has not read it
        self._characters: Characters | None = None
        self._pieces: Iterator[str | int] = self._texts(stops) if as_text else self._ids(stops)

    def __next__(self) -> str | int:
        return next(self._pieces)

    @property
    def reading(self) -> Reading:
        """All that was read and written so far, as a copy: generate(model, state=reading) continues it."""
        self._catch_up()
        if self._characters is None:
            return self._reading.clone()
        return replace(self._reading.clone(), shown=tuple(self._characters.shown), held=tuple(self._characters.held))

    @property
    def held(self) -> tuple[int, int]:
        """Tokens that the model has read, and the bytes in which it remembers them."""
        state = self._reading.state
        return int(state.length[0]), state.nbytes

    def _catch_up(self) -> None:
        """Read the prompt, and the token that was written last: put off until the next is wanted."""
        if self._prompt:
            tokens = torch.tensor([self._prompt], device=self._reading.logits.device)
            self._reading = read(self.model, self._reading, tokens, None, self.chunk)
            self._reading = replace(self._reading, shown=tuple(self._prompt[-RECENT:]), held=())
            self._prompt = []
        if self._unread is not None:
            self._reading, self._unread = write(self._step, self._reading, self._unread), None

    def _tokens(self) -> Iterator[int]:
        while self.n_tokens < self.most:
            self._catch_up()
            self._unread = next_tokens(self._reading, self.how, [self.seed])
            self.n_tokens += 1
            if int(self._unread) in self.model.conventions.eos_ids:
                self.ended = "stop"
                return
            yield int(self._unread)
        self.ended = self.ended or "length"

    def _ids(self, stops: list[int]) -> Iterator[int]:
        for token in self._tokens():
            if token in stops:
                self.ended = "stop"
                return
            yield token

    def _texts(self, stops: list[str]) -> Iterator[str]:
        self._catch_up()
        self._characters = Characters(tokenizer_of(self.model), self._reading.shown, self._reading.held)
        waiting = StopStrings(stops)
        for token in self._tokens():
            if piece := waiting.feed(self._characters.feed(token)):
                yield piece
            if waiting.ended:
                self.ended = "stop"
                return
        if rest := waiting.flush():
            yield rest


def next_tokens(reading: Reading, how: Sampling, seeds: list[int]) -> Tensor:
    """The token each row goes on with."""
    return draw(probabilities(reading.logits, reading.seen, how), seeds, reading.state.length.tolist())


def encode(model: LanguageModel, prompt: Prompt, begins: bool = True) -> list[int]:
    """Token ids of a prompt. begins: with the tokens that a text of this model begins with, if it has such.

    Raises InputError when the model has no tokenizer, no chat template or no such token.
    """
    if isinstance(prompt, str):
        special = begins and model.conventions.bos_id is not None
        return tokenizer_of(model).encode(prompt, add_special_tokens=special).ids
    if _is_chat(prompt):
        text = model.conventions.prompt(cast(Any, prompt))  # which writes its special tokens itself
        return tokenizer_of(model).encode(text, add_special_tokens=False).ids
    ids = [int(cast(int, i)) for i in prompt]
    if wrong := [i for i in ids if not 0 <= i < model.config.vocab_size]:
        raise InputError(f"token {wrong[0]} is not in the vocabulary of {model.config.vocab_size}")
    return ids


def _is_chat(prompt: Prompt) -> bool:
    return bool(prompt) and not isinstance(prompt, str) and isinstance(prompt[0], dict)


def tokenizer_of(model: LanguageModel) -> Tokenizer:
    if model.tokenizer is None:
        raise InputError("this model carries no tokenizer: give token ids instead of text")
    return model.tokenizer


def new_seed() -> int:
    return secrets.randbits(31)
