"""slipstream compare: the head-to-head on the user's own text."""

from __future__ import annotations

import typer

from slipstream.cli.settings import verb
from slipstream.compare.config import CompareConfig


def add(app: typer.Typer) -> None:
    verb(app, "compare", CompareConfig, run, positional=("data",))


def run(config: CompareConfig) -> None:
    """Which architecture fits this text: quality, recall, speed and memory, head to head at equal size.

    Work that is done is kept: the same command goes on where it was stopped, and one with another architecture runs only that one.

    Examples:

      slipstream compare my.txt

      slipstream compare my.txt --archs "mamba2; 3*kda, attention" --params 3M --budget 1h --seeds 3
    """
    from rich.console import Console

    from slipstream.compare.run import Known, Note, Progress, compare, folder
    from slipstream.report.page import write_report
    from slipstream.report.progress import Overall
    from slipstream.report.table import print_table

    console = Console(highlight=False)
    with Overall(console) as overall:

        def hear(event: Progress | Note | Known) -> None:
            if isinstance(event, Note):
                console.print(event.text)
            elif isinstance(event, Progress):
                overall.show(event.share, event.left, event.now)
            else:
                write_report(event.records, event.folder / "report.html")

        try:
            records = compare(config, hear)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
            raise
    print_table(records, console)
    console.print(f"\n[bold]{folder(config) / 'report.html'}[/] has the figures and the reasons")
