"""How many CPU threads a model runs on: one or all of them, whichever has just been measured to be faster.

All of them wait for each other at every product. Where a model is small for that, or other work keeps a core busy, one thread
alone is faster, by up to ten times; where reading the weights takes the time, all are. So no rule by size is right everywhere.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from slipstream.models.captured_step import CapturedStep
from slipstream.models.language_model import LanguageModel

ROUNDS = 5  # of each number of threads, by turns, at most
ENOUGH = 0.5  # seconds of them: somebody waits for the first token
LEARNING = 128  # tokens of the batch that training is measured on


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_by_threads(work: Callable[[], object]) -> dict[int, float]:
    """Median seconds of the work with one thread and with all; torch's number of threads is left as it was."""
    before = torch.get_num_threads()
    taken: dict[int, list[float]] = {n: [] for n in sorted({1, cores()})}
    try:
        began = time.perf_counter()
        for turn in range(ROUNDS + 1):
            for n, seconds in taken.items():
                torch.set_num_threads(n)
                start = time.perf_counter()
                work()
                if turn:  # the first warms up
                    seconds.append(time.perf_counter() - start)
            if turn and time.perf_counter() - began > ENOUGH:
                break
    finally:
        torch.set_num_threads(before)
    return {n: statistics.median(seconds) for n, seconds in taken.items()}


def fitting_threads(work: Callable[[], object]) -> int:
    """The number of threads this work is fastest with. Nothing is measured where there is no choice."""
    if cores() == 1:
        return 1
    found = seconds_by_threads(work)
    return min(found, key=found.__getitem__)


def writing(model: LanguageModel) -> Callable[[], object]:
    """The work of writing a token, to be measured."""
    token = torch.zeros(1, 1, dtype=torch.long)
    step, held = CapturedStep(model), [model.init_state(1, 4 * ROUNDS)]

    def once() -> None:
        _, held[0] = step(token, held[0])

    return once


def learning(model: LanguageModel) -> Callable[[], object]:
    """The work of training on a few tokens. It leaves no gradient behind."""
    tokens = torch.zeros(1, LEARNING, dtype=torch.long)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def batch() -> None:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        torch.autograd.grad(loss, parameters, allow_unused=True)

    return batch
