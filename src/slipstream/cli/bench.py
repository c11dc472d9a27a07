"""slipstream bench: speed, memory and recall of architectures of equal size, without training them on a text."""

from __future__ import annotations

import json
from typing import Any

import typer

from slipstream.bench.config import BenchConfig
from slipstream.cli.settings import verb
from slipstream.core.files import write_text
from slipstream.core.quantities import bytes_in_words

COLUMNS = {  # kind: the list of points it holds, what they are called, and how a value is told
    "speed": ("prefill", "reading {} tokens", lambda v: f"{v:.3g} s"),
    "state": ("bytes", "state after {}", bytes_in_words),
    "memory": ("peak", "peak memory, {}", bytes_in_words),
    "recall": ("distance", "recall from {} back", lambda v: f"{v:.0%}"),
}


def add(app: typer.Typer) -> None:
    verb(app, "bench", BenchConfig, run)


def run(config: BenchConfig) -> None:
    """Time and probe architectures of equal size: reading a prompt, writing a token, training, state, memory, recall.

    Examples:

      slipstream bench --archs mamba2,gated_deltanet,attention --params 3M

      slipstream bench --archs "attention; 3*kda, attention" --measure recall,mqar --seconds 30 --json
    """
    from rich.console import Console

    from slipstream.bench.machine import describe, overloaded
    from slipstream.bench.run import run as measure
    from slipstream.report.progress import Overall

    console = Console(highlight=False, stderr=config.as_json)
    if warning := overloaded():
        console.print(f"[yellow]{warning}[/]")
    if config.out:
        write_text(config.out / "machine.json", json.dumps(describe(), indent=2) + "\n")
    with Overall(console) as overall:
        tell = lambda share, text: overall.show(share, (1 - share) * config.seconds, {"now": text})  # noqa: E731
        records = list(measure(config, tell))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if config.out:
        write_text(config.out / "results.jsonl", lines)
    if config.as_json:
        typer.echo(lines, nl=False)
    else:
        for kind in dict.fromkeys(r["kind"] for r in records):
            _print(console, kind, [r for r in records if r["kind"] == kind])


def _print(console: Any, kind: str, records: list[dict[str, Any]]) -> None:
    """One table a kind, an architecture a row."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title=f"\n{kind}", title_justify="left")
    rows = [_row(r) for r in records]
    table.add_column("architecture")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for record, row in zip(records, rows):
        table.add_row(record["arch"], *row.values())
    console.print(table)


def _row(record: dict[str, Any]) -> dict[str, str]:
    """Column -> text."""
    kind, row = record["kind"], {}
    if kind in COLUMNS:
        points, title, told = COLUMNS[kind]
        for point in record[points]:
            at, value = (point["distance"], point["exact"]) if isinstance(point, dict) else point[:2]
            row[title.format(f"{at:,}")] = told(value)
    if kind == "speed":
        row |= {f"a token after {n:,}": f"{ms:.3g} ms" for n, ms, _ in record["decode"]}
        row["training"] = f"{record['train']:,.0f} tokens/s"
    if "examples_to_solve" in record:
        solved = record["examples_to_solve"]
        row |= {
            "solved after": f"{solved:,} examples" if solved else "not solved",
            "accuracy": f"{record['accuracy']:.0%}",
        }
    return row
