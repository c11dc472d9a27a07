"""slipstream check NAME: run the contract's laws on one mixer, in seconds, on whatever file it comes from."""

from __future__ import annotations

from pathlib import Path

import typer

from slipstream.core.cards import card, from_file


def add(app: typer.Typer) -> None:
    app.command("check")(check)


def check(name: str = typer.Argument(..., help="a name from `slipstream list`, or the file of your own mixer")) -> None:
    """Prove one architecture: its three modes are one function, its state is as declared, padding reaches nothing.

    Example:

      slipstream check gated_deltanet

      slipstream check ./my_rule.py
    """
    c = from_file(Path(name)) if name.endswith(".py") else card(name)
    from rich.console import Console

    from slipstream.core.registry import mixer_class
    from slipstream.laws import LAWS, judge
    from slipstream.laws.subject import title

    out, failed = Console(highlight=False), 0
    out.print(f"[bold]{c.name}[/] [dim]{c.path}[/]")
    for law in LAWS:
        complaint = judge(law, mixer_class(c.name))
        failed += complaint is not None
        out.print(
            f"  [green]holds[/]  {title(law)}" if complaint is None else f"  [red]broken[/] {title(law)}: {complaint}"
        )
    out.print(f"{len(LAWS) - failed} of {len(LAWS)} laws hold")
    if failed:
        raise typer.Exit(1)
