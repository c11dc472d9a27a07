"""The terminal's table and verdict: the same numbers and sentences as the page, within the width there is."""

from __future__ import annotations

import re

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slipstream.report.columns import Cell, Column, cells, columns
from slipstream.report.picks import picks
from slipstream.report.summary import Record, Row, Summary, summarise
from slipstream.report.verdict import answers, caveats

WIDEST = 100  # columns; more is hard to read and does not fit a split screen
SIDE_BY_SIDE = 76


def print_table(records: list[Record], console: Console) -> None:
    """Print the table, the verdict, what to pick for what, and what the numbers do not show."""
    summary = summarise(records)
    width = min(console.width, WIDEST)
    if shown := columns(summary):
        console.print(_fitting(shown, summary, console, width))
    console.print()
    _say(console, [(a.question, a.text) for a in answers(summary)], width)
    if chosen := picks(summary):
        console.print("\nWhich we would pick for what, and why", style="bold")
        _say(console, [(p.use, f"`{p.arch}`: {p.why}." if p.arch else f"No pick: {p.why}.") for p in chosen], width)
    console.print("\nWhat this does not show", style="bold")
    for caveat in caveats(summary):
        console.print(_bold_names(f"- {caveat}", "dim"), width=width)


def _say(console: Console, lines: list[tuple[str, str]], width: int) -> None:
    """Question and answer side by side; on a narrow screen below each other."""
    if width < SIDE_BY_SIDE:
        for head, text in lines:
            console.print(Text.assemble((head, "cyan"), "\n", _bold_names(text)), width=width)
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=28, style="cyan")
    grid.add_column()
    for head, text in lines:
        grid.add_row(head, _bold_names(text))
    console.print(grid, width=width)


def _fitting(shown: list[Column], summary: Summary, console: Console, width: int) -> Table:
    """Drop the least important columns until the rest fits."""
    while len(shown) > 1 and _natural_width(_table(shown, summary), console) > width:
        shown = [column for column in shown if column is not max(reversed(shown), key=lambda c: c.priority)]
    return _table(shown, summary)


def _natural_width(table: Table, console: Console) -> int:
    wide = console.options.update(width=1000)
    return table.__rich_measure__(console, wide).maximum


def _table(shown: list[Column], summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title_justify="left")
    table.add_column("architecture", no_wrap=True)
    for column in shown:
        table.add_column(f"{column.head}\n{column.unit}", justify="right", no_wrap=True)
    for row, found in cells(shown, summary.rows):
        table.add_row(_label(row), *[_cell(cell) for cell in found])
    return table


def _label(row: Row) -> Text:
    return Text(row.arch if len(row.arch) <= 24 else row.arch[:23] + "…")


def _cell(cell: Cell) -> Text:
    """The best is bold and starred, so that it shows without colour."""
    return Text(f"{cell.text}*", style="bold") if cell.best else Text(f"{cell.text} ")


def _bold_names(text: str, style: str = "") -> Text:
    parts = re.split(r"`([^`]*)`", text)
    return Text.assemble(*[(part, f"{style} bold".strip() if i % 2 else style) for i, part in enumerate(parts)])
