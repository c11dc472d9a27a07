"""slipstream doctor: what this machine has, how fast it is, and which form of each op runs on it and why."""

from __future__ import annotations

import json
from typing import Any

import typer


def add(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    as_json: bool = typer.Option(False, "--json", help="as JSON"),
    build: bool = typer.Option(False, "--build", help="only compile the C++ kernels, so that no first use has to wait"),
) -> None:
    """What this machine has and what runs on it, measured in a few seconds.

    Examples:

      slipstream doctor

      slipstream doctor --build

      slipstream doctor --json
    """
    if build:
        raise typer.Exit(0 if _build(as_json) else 1)
    from slipstream.bench.machine import describe, overloaded

    machine, warning = describe(), overloaded()
    if as_json:
        typer.echo(json.dumps(machine | {"warning": warning}, indent=2))
    else:
        _print(machine, warning)


def _build(as_json: bool) -> bool:
    """Compile every kernel for float32 that is not there yet; whether all are there."""
    import time

    from slipstream.ops.backends.cpp.library import build, kernels, single_precision

    rows = []
    for name, numbers in ((kernel, kind) for kernel in kernels() for kind in single_precision(kernel)):
        start = time.perf_counter()
        built = build(name, numbers)
        seconds = round(time.perf_counter() - start, 1)
        about = {"kernel": name, "numbers": numbers, "path": str(built.path or "")}
        rows.append(about | {"problem": built.problem, "seconds": seconds})
        if not as_json:
            state = f"compiled in {seconds:g} s" if built.fresh else built.problem or "there already"
            typer.echo(f"{name:<20} {numbers:<4} {state}{f': {built.path}' if built.path else ''}")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    return all(row["path"] for row in rows)


def _print(machine: dict[str, Any], warning: str) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    out.print(f"[bold]{machine['cpu']}[/], {machine['cores']} cores, {machine['memory']} of memory")
    out.print(f"instructions: {machine['simd']}")
    out.print(f"reads memory at {machine['read_gb_per_second']:g} GB/s: a step that reads 1 GB of weights takes "
              f"{1000 / machine['read_gb_per_second']:.0f} ms at best")  # fmt: skip
    out.print(
        f"multiplies matrices at {machine['matmul_gflops']:g} GFLOP/s in float32, on {machine['threads']} threads"
    )
    for row in machine["threads_measured"]:
        times = ", ".join(f"{1000 * seconds:.1f} ms on {n}" for n, seconds in row["seconds"].items())
        out.print(f"a model of {row['parameters']} parameters writes a token in {times}: it is run on {row['chosen']}")
    out.print(
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}, {machine['gpu'] or 'no GPU'}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold", title="\nWhat runs each op", title_justify="left")
    for column in ("op", "reading", "training", "why"):
        table.add_column(column)
    for row in machine["backends"]:
        table.add_row(row["op"], row["reading"], row["training"], row["why"])
    out.print(table)
    out.print(
        f"\n[yellow]{warning}[/]" if warning else f"\nload average {machine['load']:g}: timings made now can be trusted"
    )
