"""A whole comparison: planned, worked through side by side, timed alone. Work that is done is kept."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slipstream import __version__
from slipstream.bench.machine import describe
from slipstream.bench.speed import measure
from slipstream.compare import tasks
from slipstream.compare.config import CompareConfig
from slipstream.compare.plan import make_plan, shares
from slipstream.compare.results import Record, Results
from slipstream.compare.workers import Done, News, Task, run_all
from slipstream.core.files import write_text
from slipstream.data.source import read_text, run_name
from slipstream.data.text import TextData, text_data
from slipstream.models.checkpoint import load
from slipstream.models.threads import fitting_threads, writing
from slipstream.train.config import TrainConfig


@dataclass(frozen=True)
class Progress:
    """Where a comparison stands: share of all work, seconds it may still take, and what each worker is at."""

    share: float
    left: float
    now: dict[str, str]


@dataclass(frozen=True)
class Note:
    """Something the user should read."""

    text: str


@dataclass(frozen=True)
class Known:
    """Everything that is known at the end of a call, an interrupted one too: time to report."""

    folder: Path
    records: list[Record]


Listener = Callable[[Progress | Note | Known], None]


def compare(config: CompareConfig, on_event: Listener = lambda event: None) -> list[Record]:
    """Compare as the settings say; whatever an earlier call has measured in the same folder is kept.

    Raises InputError for what cannot be used; KeyboardInterrupt leaves a folder to go on from.
    """
    results = Results(folder(config))
    config = _on_disk(config, results.folder)
    data = text_data(config.data, config.tokenizer, config.context)
    with results.claimed():
        if config.fresh:
            results.clear()
        results.agree(config.settings)
        return Comparison(config, results, data, on_event).run()


def folder(config: CompareConfig) -> Path:
    """Where the results go."""
    return config.out or Path("runs") / f"compare-{run_name(config.data)}"


def _on_disk(config: CompareConfig, folder: Path) -> CompareConfig:
    """Standard input is kept as a file, since every worker reads the text itself."""
    if config.data != "-":
        return config
    kept = folder / "stdin.txt"
    write_text(kept, read_text("-").content.decode())
    return config.model_copy(update={"data": str(kept)})


class Comparison:
    """One call of compare, with its clock."""

    def __init__(self, config: CompareConfig, results: Results, data: TextData, on_event: Listener) -> None:
        self.config, self.results, self.data, self.on_event = config, results, data, on_event
        self.jobs = config.jobs or os.cpu_count() or 1
        self.started, self.total = time.monotonic(), 0.0

    def run(self) -> list[Record]:
        """Plan, work, time; what is known is told at the end, and also when the work is interrupted."""
        for note in self.data.notes:
            self.on_event(Note(note))
        plan = self.results.plan() or self._plan()
        try:
            self._work(plan)
            if "speed" in self.config.measure:
                self._speed(plan)
        finally:
            records = self._known(plan)
            self.on_event(Known(self.results.folder, records))
        return records

    def _plan(self) -> dict[str, Any]:
        """Measure how fast each architecture trains, unless the tokens are given, and share out the budget."""
        paces: dict[str, float] = {}
        if self.config.tokens is None and "quality" in self.config.measure:
            seconds = tasks.CALIBRATION + 3
            work = [
                Task(f"calibrate {a}", tasks.calibrate, (self._training(a, 0, 0),), seconds) for a in self.config.archs
            ]
            for done in self._go(work, shares(self.config)):
                paces |= {r["arch"]: r["tokens_per_second"] for r in done.records}
        plan = make_plan(self.config, self.data, paces, self.jobs)
        self.results.keep_plan(plan)
        return plan

    def _training(self, arch: str, seed: int, tokens: int, seconds: float = 0) -> TrainConfig:
        c = self.config
        by_time = {"budget": seconds} if c.equal == "time" and seconds else {"tokens": tokens or 10**9}
        return TrainConfig(
            data=c.data,
            tokenizer=c.tokenizer,
            context=self.data.context,
            arch=arch,
            params=c.params,
            batch_size=c.batch_size,
            optimizer=c.optimizer,
            lr=c.lr,
            seed=seed,
            out=self.results.folder / "models" / slug(arch) / f"seed-{seed}",
            save_every=2.0,
            threads=1,
            eval_tokens=4096,
            device="cpu",
            **by_time,
        )

    def _work(self, plan: dict[str, Any]) -> None:
        """Training and recall of every architecture and seed that is not known yet, side by side."""
        todo: list[Task] = []
        contexts = sorted({*self.config.lengths, *self.config.contexts, 32768})
        for arch, seed in ((a, s) for s in range(self.config.seeds) for a in self.config.archs):
            if "quality" in self.config.measure and not self.results.has("quality", arch, seed):
                training = self._training(arch, seed, plan["tokens"], plan["seconds_each"])
                todo.append(Task(f"train {arch}", tasks.quality, (training, contexts), plan["seconds_each"] or 60))
            if "recall" in self.config.measure and not self.results.has("recall", arch, seed):
                probe = (arch, self.config.data, seed, plan["recall_seconds"])
                todo.append(Task(f"recall {arch}", tasks.recall, probe, plan["recall_seconds"]))
        after = {"speed": plan["speed_seconds"]} if "speed" in self.config.measure else {}
        for done in self._go(todo, after):
            for record in done.records:
                self.results.add(record)
            if done.failure:
                stage = "quality" if done.task.work is tasks.quality else "recall"
                self.results.add(
                    {"kind": "failed", "arch": done.task.name.partition(" ")[2], "stage": stage, "reason": done.failure}
                )
                self.on_event(Note(f"{done.task.name} failed: {done.failure}"))

    def _go(self, todo: list[Task], after: dict[str, float]) -> Iterator[Done]:
        """Run tasks, tell how far they are, and hand on those that are done. after: seconds of work still to come."""
        shares_done = {t.name: 0.0 for t in todo}
        now: dict[str, str] = {}
        total, begun = sum(t.weight for t in todo) / self.jobs, time.monotonic()
        for event in run_all(todo, self.jobs):
            if isinstance(event, News):
                shares_done[event.task.name], now[event.task.name] = event.share, event.text
            else:
                shares_done[event.task.name] = 1.0
                now.pop(event.task.name, None)
                yield event
            left = sum(t.weight * (1 - shares_done[t.name]) for t in todo) / self.jobs
            self._tell(left, now, sum(after.values()), _pace(time.monotonic() - begun, total - left, total))

    def _tell(self, left: float, now: dict[str, str], after: float = 0.0, pace: float = 1.0) -> None:
        """left and after: expected seconds of this work and of what comes then; pace: how long a second of it really takes."""
        self.total = max(
            self.total, left + after
        )  # the share is of the most that has ever been left, so that it only grows
        share = 1 - (left + after) / self.total if self.total else 1.0
        self.on_event(Progress(share, left * pace + after, dict(now)))

    def _speed(self, plan: dict[str, Any]) -> None:
        """Prefill and decode of the trained models, one at a time, alone on the machine; interleaved repetitions."""
        todo = [a for a in self.config.archs if not self.results.has("speed", a)]
        folders = {a: self._training(a, 0, 0).out for a in todo}
        models = {a: load(f) for a, f in folders.items() if f and (f / "config.json").exists()}
        if not models:
            return
        torch.set_num_threads(fitting_threads(writing(next(iter(models.values())))))
        budget = plan["speed_seconds"] * len(models) / len(self.config.archs)
        listen = lambda share, text: self._tell(budget * (1 - share), {"timing": text})  # noqa: E731
        for record in measure(models, self.config.lengths, self.config.contexts, budget, listen):
            self.results.add(record)

    def _known(self, plan: dict[str, Any]) -> list[Record]:
        """All records of the architectures asked for, and the setup they belong to."""
        known = [r for r in self.results.records() if r["kind"] != "setup" and r.get("arch", "") in self.config.archs]
        setup = self._setup(plan, known)
        self.results.add(setup)
        return [setup, *known]

    def _setup(self, plan: dict[str, Any], known: list[Record]) -> Record:
        c = self.config
        wanted = {"quality": c.seeds, "recall": c.seeds, "speed": 1}
        missing = [
            a for a in c.archs for m in c.measure if sum(r["kind"] == m and r["arch"] == a for r in known) < wanted[m]
        ]
        return {
            "kind": "setup",
            "data": self.data.name,
            "data_bytes": round(len(self.data.tokens.ids) * self.data.bytes_per_token),
            "archs": c.archs,
            "params": c.params,
            "tokens": plan["tokens"],
            "context": plan["context"],
            "seeds": list(range(c.seeds)),
            "equal": c.equal,
            "baseline_bpb": plan["baseline_bpb"],
            "machine": describe(measured=False),
            "command": command(c),
            "version": __version__,
            "finished": not missing,
            "seconds": time.monotonic() - self.started,
        }


def _pace(elapsed: float, done: float, total: float) -> float:
    """Seconds that an expected second has taken so far; 1 until a twentieth of the work is there to tell."""
    return elapsed / done if done > 0.05 * total else 1.0


def slug(arch: str) -> str:
    """A folder name for an architecture: its letters, and a few of a hash where that loses something."""
    plain = re.sub(r"[^a-z0-9_]+", "-", arch.lower()).strip("-")
    return plain if plain == arch else f"{plain[:60]}-{hashlib.sha256(arch.encode()).hexdigest()[:6]}"


def command(config: CompareConfig) -> str:
    """The call that repeats this comparison."""
    words = ["slipstream", "compare", *([config.data] if config.data else [])]
    for name, field in CompareConfig.model_fields.items():
        value = getattr(config, name)
        if name not in ("data", "fresh") and value != field.default:
            text = ("; " if name == "archs" else ",").join(map(str, value)) if type(value) is list else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)
