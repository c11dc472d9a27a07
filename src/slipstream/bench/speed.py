"""How fast models read and write: medians of repetitions interleaved over the models, so that a disturbance hits all alike."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.core.state import State
from slipstream.models.language_model import LanguageModel

Record = dict[str, Any]
Listener = Callable[[float, str], None]
LEAST, MOST = 3, 15  # repetitions; the least only while the budget lasts
DECODE = 8  # tokens written in one timing
TRAIN = (4, 256)  # rows and tokens of a timed training step


@dataclass
class Probe:
    """One thing that is timed again and again. units: tokens it handles, to divide by."""

    arch: str
    kind: str
    size: int
    run: Callable[[], float]


def measure(
    models: dict[str, LanguageModel],
    lengths: list[int],
    contexts: list[int],
    budget: float,
    listen: Listener = lambda share, text: None,
    train: bool = True,
) -> list[Record]:
    """A speed record a model: prefill seconds by prompt length, decode ms a token by context, training tokens a second.

    budget: seconds in all. The first run of each probe is thrown away; each then runs at least once, mostly LEAST to MOST times.
    """
    started = time.perf_counter()
    probes = [p for name, model in models.items() for p in _probes(name, model, lengths, contexts, train)]
    times: dict[int, list[float]] = defaultdict(list)
    for i, p in enumerate(probes):
        listen(0.3 * i / len(probes), f"{p.arch}: {p.kind} {p.size}")
        p.run()
    warm = time.perf_counter() - started
    for round_ in range(MOST):
        for i, p in enumerate(probes):
            spent = time.perf_counter() - started
            if round_ >= (1 if spent > budget else LEAST) and spent + warm * 0.5 > budget:
                return [_record(name, probes, times) for name in models]
            times[i].append(p.run())
            listen(min(0.99, max(0.3, spent / budget)), f"{p.arch}: {p.kind} {p.size}")
    return [_record(name, probes, times) for name in models]


def state_record(arch: str, model: LanguageModel, contexts: list[int]) -> Record:
    """Bytes one sequence keeps, by context: as declared, which the laws compare with what is kept."""
    return {"kind": "state", "arch": arch, "bytes": [[n, model.state_bytes(n)] for n in contexts]}


def _probes(name: str, model: LanguageModel, lengths: list[int], contexts: list[int], train: bool) -> list[Probe]:
    model.eval()
    prefill = [Probe(name, "prefill", n, lambda n=n: _prefill(model, _tokens(model, 1, n))) for n in lengths]
    read = {n: _read(model, n) for n in contexts}
    decode = [Probe(name, "decode", n, lambda n=n: _decode(model, read[n])) for n in contexts]
    steps = [Probe(name, "train", TRAIN[0] * TRAIN[1], lambda: _train(model, _tokens(model, *TRAIN)))] if train else []
    return [*prefill, *decode, *steps]


def _tokens(model: LanguageModel, rows: int, n: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, n), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _prefill(model: LanguageModel, tokens: Tensor) -> float:
    """Seconds to read a prompt and predict the next token."""
    start = time.perf_counter()
    model.prefill(tokens)
    return time.perf_counter() - start


@torch.no_grad()
def _read(model: LanguageModel, context: int) -> State:
    """The state after a context, with room to write."""
    return model.reserve(model.prefill(_tokens(model, 1, context), logits=None)[1], 4 * DECODE)


@torch.no_grad()
def _decode(model: LanguageModel, state: State) -> float:
    """Milliseconds a token, writing a few after the context."""
    state, token = state.clone(), torch.zeros(1, 1, dtype=torch.long)
    model.step(token, state.clone())
    start = time.perf_counter()
    for _ in range(DECODE):
        logits, state = model.step(token, state)
        token = logits.argmax(-1)
    return 1e3 * (time.perf_counter() - start) / DECODE


def _train(model: LanguageModel, tokens: Tensor) -> float:
    """Tokens a second, forward and backward."""
    start = time.perf_counter()
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model.zero_grad(set_to_none=True)
    return tokens.numel() / (time.perf_counter() - start)


def _record(name: str, probes: list[Probe], times: dict[int, list[float]]) -> Record:
    """Medians, each with its spread: half the distance between the quartiles."""
    found: dict[str, list[list[float]]] = {"prefill": [], "decode": [], "train": []}
    for i, p in enumerate(probes):
        if p.arch == name and times[i]:
            found[p.kind].append([p.size, statistics.median(times[i]), _spread(times[i])])
    trained = found["train"][0][1] if found["train"] else None
    return {"kind": "speed", "arch": name, "prefill": found["prefill"], "decode": found["decode"], "train": trained}


def _spread(times: list[float]) -> float:
    if len(times) < 3:
        return (max(times) - min(times)) / 2
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2
