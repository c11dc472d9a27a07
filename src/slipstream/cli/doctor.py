"""slipstream doctor: what this machine has, how fast it is, and which form of each op runs on it."""

from __future__ import annotations

import json

import typer


def add(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(as_json: bool = typer.Option(False, "--json", help="as JSON")) -> None:
    """What this machine has: cores, vector instructions, memory bandwidth and matmul rate as measured, backends and why.

    Example:

      slipstream doctor --json
    """
    from slipstream.bench.machine import describe, two_threads_help

    facts = describe() | {"small_step_ms_by_threads": two_threads_help()}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


def _print(facts: dict) -> None:
    from rich.console import Console

    out = Console(highlight=False, soft_wrap=True)
    gpu = facts["gpu"] or "none; everything runs on the CPU"
    out.print(f"[bold]CPU[/]      {facts['cpu']}, {facts['cores']} cores ({', '.join(facts['simd'])}), {facts['memory_gib']} GiB")
    out.print(f"[bold]GPU[/]      {gpu}")
    out.print(f"[bold]Software[/] Python {facts['python']}, torch {facts['torch']} on {facts['threads']} threads, {facts['os']}")
    out.print(f"[bold]Measured[/] {facts['matmul_gflops']} GFLOP/s in matrix products, {facts['read_gb_per_s']} GB/s reading memory")
    out.print("[bold]Threads[/]  a small step takes " + _threads(facts["small_step_ms_by_threads"]))
    if facts["load"] > 0.7 * facts["cores"]:
        out.print(f"[yellow]Busy[/]     load {facts['load']} on {facts['cores']} cores: timings made now say little")
    if facts["backends"]:
        for op, names in facts["backends"].items():
            out.print(f"[bold]{op}[/] {', '.join(names)}, else torch")
    else:
        out.print("[bold]Backends[/] every op runs its torch form: this version has no compiled kernels yet")


def _threads(found: dict[str, float]) -> str:
    ways = [f"{ms} ms on {n} thread{'s' if n != '1' else ''}" for n, ms in found.items()]
    best = min(found, key=lambda n: found[n])
    return f"{', '.join(ways)}: tiny models run on {best}"
