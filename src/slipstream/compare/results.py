"""What is known so far: one JSON line a record, appended as soon as it is measured, read back by the next call."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slipstream.core.errors import InputError
from slipstream.core.files import write_text

Record = dict[str, Any]


class Results:
    """The folder of a comparison: settings.json, plan.json, results.jsonl, models/, report.html."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = folder / "results.jsonl"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder against a second comparison running at the same time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another comparison is running in {self.folder}; wait for it, or choose another --out"
                ) from None
            yield

    def clear(self) -> None:
        """Forget everything but the lock."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def agree(self, settings: dict[str, Any]) -> None:
        """Keep the settings of the first call. Raises InputError naming what a later one has changed."""
        file = self.folder / "settings.json"
        if not file.exists():
            write_text(file, json.dumps(settings, indent=2) + "\n")
            return
        kept = json.loads(file.read_text())
        changed = [f"{k} was {kept.get(k)!r}, is {v!r}" for k, v in settings.items() if kept.get(k) != v]
        if changed:
            raise InputError(
                f"{self.folder} holds a comparison with other settings ({'; '.join(changed)}); use --fresh or another --out"
            )

    def plan(self) -> dict[str, Any] | None:
        file = self.folder / "plan.json"
        return json.loads(file.read_text()) if file.exists() else None

    def keep_plan(self, plan: dict[str, Any]) -> None:
        write_text(self.folder / "plan.json", json.dumps(plan, indent=2) + "\n")

    def records(self) -> list[Record]:
        """Everything measured, the newest of each (kind, arch, seed); a line cut short by a kill is left out."""
        newest: dict[tuple, Record] = {}
        for line in self.lines.read_text().splitlines() if self.lines.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            newest[key(record)] = record
        return list(newest.values())

    def add(self, record: Record) -> None:
        """Append one record; it is on disk when this returns."""
        torn = self.lines.exists() and self.lines.stat().st_size and not self.lines.read_bytes().endswith(b"\n")
        with open(self.lines, "a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def has(self, kind: str, arch: str, seed: int | None = None) -> bool:
        return any(key(r) == (kind, arch, seed) for r in self.records())


def key(record: Record) -> tuple:
    return record["kind"], record.get("arch"), record.get("seed")
