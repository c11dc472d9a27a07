"""`slipstream bench`: everything this room measures, for some architectures of equal size, as records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from slipstream.bench.config import BenchConfig
from slipstream.bench.copying import Copying
from slipstream.bench.learn import Tell, learn
from slipstream.bench.memory import memory_record
from slipstream.bench.mqar import Mqar
from slipstream.bench.probe_model import probe_model
from slipstream.bench.recall import recall_probe
from slipstream.bench.speed import measure, state_record
from slipstream.bench.task import Task
from slipstream.data.source import read_text
from slipstream.models.language_model import LanguageModel, language_model

Record = dict[str, Any]
TASKS = {"mqar": Mqar, "copying": Copying}


def run(config: BenchConfig, on_progress: Tell = lambda share, text: None) -> Iterator[Record]:
    """Records as they are measured. Speed and memory at --params; the recall tasks on their own small models, in one thread."""
    chosen = [m for m in config.measure if m in ("speed", "state", "memory")]
    models = (
        {a: language_model(a, params=config.params, seed=config.seed).eval() for a in config.archs} if chosen else {}
    )
    if "speed" in chosen:
        torch.set_num_threads(config.threads)
        yield from measure(models, config.lengths, config.contexts, config.seconds, on_progress)
    for arch, model in models.items():
        yield from _sizes(arch, model, config)
    torch.set_num_threads(1)
    for kind in (m for m in config.measure if m not in chosen):
        for arch in config.archs:
            tell: Tell = lambda share, text, now=f"{kind} of {arch}": on_progress(share, f"{now}: {text}")  # type: ignore[misc] # noqa: E731
            yield (
                _recall(config, arch, tell)
                if kind == "recall"
                else task_record(TASKS[kind](), kind, arch, config, tell)
            )


def _sizes(arch: str, model: LanguageModel, config: BenchConfig) -> Iterator[Record]:
    if "state" in config.measure:
        yield state_record(arch, model, sorted({*config.lengths, *config.contexts}))
    if "memory" in config.measure:
        yield memory_record(arch, model.config, config.lengths)


def _recall(config: BenchConfig, arch: str, tell: Tell) -> Record:
    return recall_probe(arch, read_text(config.data).content, config.seconds, config.seed, tell)


def task_record(task: Task, name: str, arch: str, config: BenchConfig, tell: Tell) -> Record:
    """A record of how a standard task was learned, of the kind its name says."""
    model = probe_model(arch, task.vocab_size, config.seed)
    learned = learn(model, task, config.seconds, config.seed, tell)
    return {
        "kind": name, "arch": arch, "seed": config.seed, "examples_to_solve": learned.examples_to_solve,
        "examples": learned.examples, "seconds": learned.seconds, "accuracy": learned.accuracy,
        "curve": [list(point) for point in learned.curve],
    }  # fmt: skip
