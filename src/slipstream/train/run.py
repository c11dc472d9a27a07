"""A whole run in a folder: started, resumed or found finished, always by the same call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from slipstream.core.errors import InputError
from slipstream.core.quantities import in_words
from slipstream.data.source import run_name
from slipstream.data.text import TextData, text_data
from slipstream.models.config import Wiring
from slipstream.models.language_model import LanguageModel, language_model
from slipstream.models.threads import fitting_threads, learning
from slipstream.train.config import PARAMS, TrainConfig
from slipstream.train.folder import RunFolder, default_folder, describe, written
from slipstream.train.interrupt import Interrupt, on_interrupt
from slipstream.train.loop import Point, Trainer


@dataclass(frozen=True)
class Note:
    """Something the user should read: what is trained, what was skipped, where it goes on."""

    text: str


@dataclass(frozen=True)
class Result:
    """How a run ended. bits_per_byte: of the held-out text."""

    out: Path
    step: int
    tokens: int
    seconds: float
    bits_per_byte: float


Listener = Callable[[Note | Point], None]


def train(config: TrainConfig, on_event: Listener = lambda event: None) -> Result:
    """Train as the settings say, from wherever an earlier call with the same settings stopped.

    Ctrl-C finishes the step, saves, and raises KeyboardInterrupt. Raises InputError for what cannot be used.
    """
    folder = RunFolder(config.out or default_folder(run_name(config.data)))
    data = text_data(config.data, config.tokenizer, config.context, folder.tokens)
    begun_with = None if config.fresh else folder.threads()
    trainer = prepare(config, data, begun_with)  # before anything is written, so that a mistake leaves nothing behind
    folder.claim(config, data.key)
    with written(folder.path):
        trainer.data = data.kept_in(folder.tokens)
    for note in data.notes:
        on_event(Note(note))
    folder.resume(trainer)
    if trainer.finished and folder.model_is_there():
        on_event(Note(f"{folder.path} is finished already; --fresh starts over"))
        return _result(folder, folder.last_point())
    on_event(Note(_opening(trainer, data)))
    with on_interrupt() as interrupt:
        return _go(trainer, folder, config, on_event, interrupt)


def prepare(config: TrainConfig, data: TextData, threads: int | None = None) -> Trainer:
    """The model and its trainer at step 0, on the device asked for. threads: those that the run began with, where it has.

    With another number of threads sums are rounded otherwise, so a run keeps its own unless it is told one.
    """
    model = build(config, data)
    model.tokenizer = data.tokenizer
    torch.set_num_threads(config.threads or threads or fitting_threads(learning(model)))
    return Trainer(model.to(_device(config.device)), data, config)


def build(config: TrainConfig, data: TextData) -> LanguageModel:
    """By widths when both are given, else by the number of parameters."""
    sizes = {"n_layers": config.n_layers, "d_model": config.d_model}
    if config.params is not None or None in sizes.values():
        sizes["params"] = config.params or PARAMS
    wiring = {n: getattr(config, n) for n in Wiring.model_fields}
    return language_model(config.arch, vocab_size=data.vocab_size, seed=config.seed, **sizes, **wiring)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here: {why}; try --device cpu") from None


def _go(trainer: Trainer, folder: RunFolder, config: TrainConfig, on_event: Listener, interrupt: Interrupt) -> Result:
    folder.forget_after(trainer.step)
    folder.save(trainer)  # before any work is done, so that a full disk is found now
    saved = time.monotonic()
    for point in trainer.run():
        folder.append(point)
        on_event(point)
        for warning in point.warnings or ():
            on_event(Note(f"warning: step {point.step}: {warning}"))
        if trainer.finished or interrupt.asked or time.monotonic() - saved >= config.save_every:
            folder.save(trainer)
            saved = time.monotonic()
        if interrupt.asked and not trainer.finished:
            on_event(Note(f"saved at step {trainer.step} in {folder.path}; the same command goes on from there"))
            raise KeyboardInterrupt
    return _result(folder, folder.last_point())


def _result(folder: RunFolder, last: Point) -> Result:
    assert last.validation is not None, "the last step of a run is always validated"
    return Result(folder.path, last.step, last.tokens, last.seconds, last.validation)


def _opening(trainer: Trainer, data: TextData) -> str:
    """What is about to happen, in one line."""
    bounded = trainer.recipe.most_tokens < float("inf")
    length = f"{in_words(trainer.recipe.most_tokens)} tokens" if bounded else "as long as the budget"
    passes = trainer.recipe.most_tokens / len(data.training.tokens)
    again = f", the text {passes:.1f} times" if 1 < passes < float("inf") else ""
    begun = f"; going on at step {trainer.step}" if trainer.step else ""
    return f"{describe(trainer.model)}; {length} of {data.name}{again}, context {data.context}{begun}"
