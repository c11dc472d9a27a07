"""A run on the screen: a bar on a terminal, plain lines elsewhere; both on stderr, so that stdout holds facts alone."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from slipstream.core.quantities import duration_in_words, in_words
from slipstream.train.loop import Point
from slipstream.train.run import Note

LINE_EVERY = 10.0  # seconds between plain lines
SMOOTH = 0.9


class Screen:
    """Shows what it is called with: screen(Note or Point). Use as a context manager."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar = (
            Progress(
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %  {task.description}"),
                console=self.console,
            )
            if sys.stderr.isatty()
            else None
        )
        self.task = self.bar.add_task("") if self.bar else None
        self.first: Point | None = None
        self.started = self.told = time.monotonic()
        self.loss = 0.0

    def __enter__(self) -> Screen:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, event: Note | Point) -> None:
        if isinstance(event, Note):
            self.console.print(event.text, markup=False, soft_wrap=True)
        else:
            self._point(event)

    def _point(self, point: Point) -> None:
        self.loss = SMOOTH * self.loss + (1 - SMOOTH) * point.bits_per_byte if self.first else point.bits_per_byte
        line = self._line(point)
        self.first = self.first or point
        if point.validation is not None:
            self.console.print(f"step {point.step:>6}  validation {point.validation:.3f} bits per byte", markup=False)
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=100 * point.done, description=line)
        elif time.monotonic() - self.told >= LINE_EVERY or point.done >= 1:
            self.told = time.monotonic()
            self.console.print(f"step {point.step:>6}  {100 * point.done:3.0f} %  {line}", markup=False, soft_wrap=True)

    def _line(self, point: Point) -> str:
        rate = ""
        if self.first and point.seconds > self.first.seconds:
            speed = (point.tokens - self.first.tokens) / (point.seconds - self.first.seconds)
            share = (point.done - self.first.done) / (time.monotonic() - self.started)
            rate = (
                f"  {in_words(speed)} tokens/s  {duration_in_words(round((1 - point.done) / share))} left"
                if share
                else ""
            )
        return f"{self.loss:.3f} bits/byte{rate}"
