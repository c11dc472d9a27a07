"""How far a long job is, with an estimate: a live bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from slipstream.core.quantities import duration_in_words

EVERY = 15.0  # seconds between plain lines


class Overall:
    """One bar for the whole job, and a line for each thing that is going on."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, transient=True, refresh_per_second=4) if console.is_terminal else None
        self.said = 0.0

    def __enter__(self) -> Overall:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def show(self, share: float, left: float, now: dict[str, str]) -> None:
        """share of the work that is done, seconds it may still take, and what is going on by name."""
        if self.live:
            self.live.update(_panel(share, left, now))
        elif time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            going_on = "; ".join(f"{name}: {text}" for name, text in now.items())
            self.console.print(f"{share:4.0%}, about {duration_in_words(round(left))} left; {going_on}", soft_wrap=True)


def _panel(share: float, left: float, now: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_row(
        ProgressBar(total=1.0, completed=share, width=40), f"{share:4.0%}  about {duration_in_words(round(left))} left"
    )
    for name, text in now.items():
        table.add_row(f"  {name}", text)
    return table
