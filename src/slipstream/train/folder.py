"""The folder of a run: a Hugging Face directory, plus

    run.json              the settings it was started with
    metrics.jsonl         one line a step
    trainer.safetensors   weights, optimiser and step in one file, so that they can never be of different steps
    tokens/               the data as tokens

The model is written before trainer.safetensors: a run whose trainer is finished has its last weights in place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slipstream.core.errors import InputError
from slipstream.core.files import replacing, write_text
from slipstream.models.language_model import LanguageModel
from slipstream.train.config import TrainConfig
from slipstream.train.loop import Point, Trainer

FREE_TO_CHANGE = {
    "data",
    "out",
    "fresh",
    "save_every",
    "threads",
    "device",
    "as_json",
}  # a run may go on with others of these
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json")


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings, self.metrics = path / "run.json", path / "metrics.jsonl"
        self.trainer = path / "trainer.safetensors"
        self.tokens = path / "tokens"

    def claim(self, config: TrainConfig, data_key: str) -> None:
        """Make the folder this run's, or find that it is already. Raises InputError when it is another's."""
        kept = {"data_key": data_key, **config.model_dump(mode="json", exclude=FREE_TO_CHANGE)}
        if config.fresh:
            self._clear()
        with written(self.path):
            if not self.settings.is_file():
                self._refuse_foreign()
                write_text(self.settings, json.dumps(kept, indent=2) + "\n")
        self._refuse_other(kept)
        self._sweep()

    def _clear(self) -> None:
        if self.settings.is_file():
            for file in (self.trainer, self.metrics, *(self.path / n for n in MODEL_FILES), self.settings):
                file.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what a kill left half-written: our temporary files, and those of safetensors (.tmp and six letters)."""
        for pattern in (".*.partial", ".tmp??????"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)
        for folder in self.tokens.glob(".*.partial"):
            shutil.rmtree(folder, ignore_errors=True)

    def _refuse_foreign(self) -> None:
        if found := [n for n in MODEL_FILES if (self.path / n).exists()]:
            raise InputError(f"{self.path} holds {found[0]} of something that is no training run; choose another --out")

    def _refuse_other(self, kept: dict[str, Any]) -> None:
        defaults = {n: f.default for n, f in TrainConfig.model_fields.items()}  # of what is newer than the run
        stored = defaults | json.loads(self.settings.read_text(encoding="utf-8"))
        names = [n for n in kept if stored.get(n) != kept[n]]
        if names:
            told = ", ".join("the text" if n == "data_key" else f"{n} ({stored.get(n)}, now {kept[n]})" for n in names)
            fix = "choose another --out, or start over with --fresh"
            raise InputError(f"{self.path} holds a run that differs in {told}; {fix}")

    def position(self) -> tuple[int, float] | None:
        """Step and seconds of the last checkpoint, or None when there is none."""
        if not self.trainer.is_file():
            return None
        with self._opened() as stored:
            about = stored.metadata()
        return int(about["step"]), float(about["seconds"])

    def threads(self) -> int | None:
        """CPU threads of the last checkpoint, or None when it does not say or there is none."""
        if not self.trainer.is_file():
            return None
        with self._opened() as stored:
            found = stored.metadata().get("threads")
        return found and int(found)

    def resume(self, trainer: Trainer) -> None:
        """Put the trainer where the last checkpoint left it."""
        at = self.position()
        if at is None:
            return
        with self._opened() as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
        trainer.restore(tensors, *at)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self.trainer, framework="pt") as stored:
                yield stored
        except SafetensorError as error:
            raise InputError(f"{self.trainer} is damaged ({error}); start over with --fresh") from None

    def save(self, trainer: Trainer) -> None:
        """Write the model, then the trainer; each file appears whole or not at all."""
        with written(self.path):
            trainer.model.save(self.path)
            about = {"format": "slipstream.trainer", "step": str(trainer.step), "seconds": repr(trainer.seconds)}
            about["threads"] = str(torch.get_num_threads())
            with replacing(self.trainer) as temporary:
                save_file({n: t.contiguous() for n, t in trainer.tensors().items()}, temporary, about)

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that will be made again."""
        kept = [line for line in self._lines() if line["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The metrics written so far; a last line cut short by a kill is left out."""
        if self.metrics.is_file():
            for line in self.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):
                    yield json.loads(line)

    def last_point(self) -> Point:
        """The last step that was written down."""
        *_, last = self._lines()
        return Point(**last)

    def append(self, point: Point) -> None:
        with written(self.path), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({n: v for n, v in asdict(point).items() if v is not None}) + "\n")

    def model_is_there(self) -> bool:
        return all((self.path / n).is_file() for n in MODEL_FILES)


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Whatever keeps a folder from being written to, in one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from None
    except SafetensorError as error:  # "Error while serializing: I/O error: No space left on device (os error 28)"
        why = str(error).rpartition("error: ")[2].partition(" (os error")[0]
        raise InputError(f"cannot write to {folder}: {why}; choose another --out") from None


def default_folder(name: str) -> Path:
    return Path("runs") / name


def describe(model: LanguageModel) -> str:
    """The model in a few words."""
    c, total, active = model.config, model.n_parameters(), model.n_active_parameters()
    used = f" ({active:,} of them for one token)" if active < total else ""
    return f"{c.pattern}: {total:,} parameters{used}, {c.n_layers} layers, d_model {c.d_model}"
