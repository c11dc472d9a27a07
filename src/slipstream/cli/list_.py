"""slipstream list: every mixer, what it costs and where it is from. Reads the files, imports no mixer."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from slipstream.core.cards import Card, cards
from slipstream.core.errors import InputError, nearest
from slipstream.policies.catalogue import policy_cards

COLUMNS = ("name", "family", "memory", "train", "per token", "what it is")


def add(app: typer.Typer) -> None:
    app.command("list")(list_mixers)


def list_mixers(
    family: str = typer.Option(
        None, help="only this family: attention, linear, sparse, delta, ttt, ssm, rnn, conv, feedforward"
    ),
    policies: bool = typer.Option(False, "--policies", help="the cache and prefill policies instead of the mixers"),
    as_json: bool = typer.Option(False, "--json", help="as JSON"),
) -> None:
    """Every architecture there is: family, how its memory grows, what training and decoding cost, where it is from.

    Examples:

      slipstream list --family delta

      slipstream list --policies

      slipstream list --json
    """
    if policies:
        _list_policies(as_json)
        return
    chosen = [c for c in cards().values() if family in (None, c.family)]
    if not chosen:
        raise InputError(f"no family is called {family!r}; {nearest(family, {c.family for c in cards().values()})}")
    if as_json:
        typer.echo(json.dumps([facts(c) for c in chosen], indent=2))
    else:
        _print_table(chosen)


def facts(c: Card) -> dict[str, object]:
    """A card as plain values."""
    return {
        "name": c.name,
        "family": c.family,
        "title": c.title,
        "state_growth": c.state_growth,
        "train": f"O({c.train_order})",
        "decode": f"O({c.decode_order})",
        "paper": c.paper,
        "use_when": c.use_when,
        "equation": c.equation,
        "memory": {"writes": c.writes, "erases": c.erases, "decays": c.decays, "reads": c.reads},
        "settings": {n: {"type": t, "default": d, "meaning": m} for n, (t, d, m) in c.fields.items()},
    }


def _list_policies(as_json: bool) -> None:
    """Ways of running trained softmax mixers for less."""
    if as_json:
        typer.echo(json.dumps([asdict(c) for c in policy_cards()], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("setting", "name", "takes", "what it is"):
        table.add_column(column, no_wrap=column in ("setting", "name"), overflow="fold")
    for c in policy_cards():
        table.add_row(c.setting, f"[bold]{c.name}[/]", c.takes, f"{c.title} [dim]({c.paper})[/]")
    Console().print(table)
    Console().print(
        "[dim]slipstream generate RUN PROMPT --cache h2o:512 --prefill-policy minference runs a model so[/]"
    )


def _print_table(chosen: list[Card]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, no_wrap=column != "what it is", overflow="fold")
    previous = None
    for c in chosen:
        if previous not in (None, c.family):
            table.add_section()
        previous = c.family
        table.add_row(
            f"[bold]{c.name}[/]",
            c.family,
            c.state_growth,
            f"O({c.train_order})",
            f"O({c.decode_order})",
            f"{c.title} [dim]({c.source})[/]",
        )
    Console().print(table)
    Console().print("[dim]slipstream show NAME explains one; slipstream compare FILE measures them on your text[/]")
