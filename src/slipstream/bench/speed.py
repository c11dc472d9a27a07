"""How fast models read a prompt, write the next token after it, and train; and what they have to remember for it.

Times are of batch 1, in float32, with as many threads as torch has been given; models of one call are timed in turn, so that
they share whatever the machine is busy with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from slipstream.bench.timing import Timing, interleaved
from slipstream.core.state import State
from slipstream.models.captured_step import CapturedStep
from slipstream.models.language_model import LanguageModel

Tell = Callable[[float, str], None]  # share of the time that is used, what is going on
Record = dict[str, Any]
Models = Mapping[str, LanguageModel]

TRAIN_SHAPE = (8, 256)  # sequences and tokens of one training step
STEPS = 16  # tokens written in one go, to time one of them
KEPT_ROOM = 1024  # tokens a growing state has room for after its context: far more than are written here


def measure(
    models: Models,
    lengths: Sequence[int] = (512, 2048, 8192),
    contexts: Sequence[int] = (512, 8192),
    seconds: float = 60.0,
    on_progress: Tell = lambda share, text: None,
) -> list[Record]:
    """A record of kind "speed" for each model: prefill [[tokens, seconds, spread]], decode [[context, ms, spread]] and train,
    in tokens a second. seconds: for everything; where it is too short, every figure is still measured once."""
    jobs = [("train", 0), *(("decode", n) for n in sorted(contexts)), *(("prefill", n) for n in sorted(lengths))]
    jobs.sort(key=lambda job: (job[1], job[0]))
    clock, found = Clock(seconds), {}
    for i, (kind, tokens) in enumerate(jobs):
        now = f"{kind} at {tokens:,} tokens" if tokens else kind
        on_progress(clock.share(), now)
        with torch.set_grad_enabled(kind == "train"):
            work = {name: WORK[kind](model, tokens) for name, model in models.items()}
            tell = lambda n, now=now: on_progress(clock.share(), now)  # noqa: E731
            found[kind, tokens] = interleaved(work, clock.left() / (len(jobs) - i), on_round=tell)
    on_progress(1.0, "timed")
    return [_record(name, found) for name in models]


class Clock:
    """What is left of a budget."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.perf_counter(), seconds

    def left(self) -> float:
        return max(0.0, self.seconds - (time.perf_counter() - self.start))

    def share(self) -> float:
        return 1 - self.left() / self.seconds if self.seconds else 1.0


def random_tokens(model: Any, *shape: int) -> torch.Tensor:
    """Of the vocabulary that the model's config tells: ours, or one of transformers."""
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def reading(model: LanguageModel, tokens: int) -> Callable[[], object]:
    """A prompt in one call."""
    prompt = random_tokens(model, 1, tokens)
    return lambda: model.prefill(prompt, model.init_state(1, tokens), logits="last")


def writing(model: LanguageModel, context: int) -> Callable[[], object]:
    """STEPS tokens after a context, which is read here, untimed. The state goes on from call to call."""
    _, state = model.prefill(random_tokens(model, 1, context), model.init_state(1, context + KEPT_ROOM), logits=None)
    return partial(_write, CapturedStep(model), random_tokens(model, 1, 1), [state])


def _write(step: CapturedStep, token: torch.Tensor, held: list[State]) -> None:
    for _ in range(STEPS):
        _, held[0] = step(token, held[0])


def training(model: LanguageModel, _: int) -> Callable[[], object]:
    """Forward and backward of one batch, without the optimiser, which is the same for all."""
    batch = random_tokens(model, TRAIN_SHAPE[0], TRAIN_SHAPE[1] + 1)

    def once() -> None:
        logits = model(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    return once


WORK = {"prefill": reading, "decode": writing, "train": training}


def _record(name: str, found: dict[tuple[str, int], dict[str, Timing]]) -> Record:
    def points(kind: str, unit: float) -> list[list[float]]:
        return [[n, t[name].seconds * unit, t[name].spread * unit] for (k, n), t in found.items() if k == kind]

    tokens = TRAIN_SHAPE[0] * TRAIN_SHAPE[1]
    return {
        "kind": "speed",
        "arch": name,
        "prefill": points("prefill", 1.0),
        "decode": points("decode", 1000 / STEPS),
        "train": tokens / found["train", 0][name].seconds,
    }


def state_record(name: str, model: LanguageModel, contexts: Sequence[int]) -> Record:
    """Bytes one sequence keeps after so many tokens, and bytes the next token moves: read off the mixers' slots, not measured."""
    return {
        "kind": "state",
        "arch": name,
        "bytes": [[n, model.state_bytes(n)] for n in contexts],
        "moved": [[n, model.bytes_per_token(n)] for n in contexts],
    }
