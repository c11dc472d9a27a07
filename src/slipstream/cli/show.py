"""slipstream show NAME: one mixer's equation, memory, cost, settings, source, and when to use it."""

from __future__ import annotations

import json

import typer

from slipstream.cli.list_ import facts
from slipstream.core.cards import Card, card
from slipstream.core.notation import typeset
from slipstream.core.quantities import bytes_in_words, in_words

CONTEXTS = (512, 8192, 131072)


def add(app: typer.Typer) -> None:
    app.command("show")(show)


def show(
    name: str = typer.Argument(..., help="a name from `slipstream list`"),
    d_model: int = typer.Option(768, help="width for which memory and cost are printed"),
    as_json: bool = typer.Option(False, "--json", help="as JSON"),
) -> None:
    """Explain one architecture: equation, memory, cost, settings, source, when to use it.

    Examples:

      slipstream show gated_deltanet

      slipstream show mamba --d-model 2048 --json
    """
    c = card(name)
    sizes = measure(name, d_model)
    if as_json:
        typer.echo(json.dumps(facts(c) | {"d_model": d_model, "sizes": sizes}, indent=2))
    else:
        _print(c, d_model, sizes)


def measure(name: str, d_model: int) -> dict[str, object]:
    """Parameters, state bytes and decode flops of a layer of this width, from the live class without storage."""
    import torch

    from slipstream.core.registry import build

    with torch.device("meta"):
        mixer = build(name, {"d_model": d_model})
    return {
        "parameters": sum(p.numel() for p in mixer.parameters()),
        "state_bytes": {T: mixer.state_bytes(T) for T in CONTEXTS},
        "forward_flops_per_token": {T: mixer.cost(T).flops / T for T in CONTEXTS},
        "step_flops": {T: mixer.cost(T, 1, "step").flops for T in CONTEXTS},
        "symbols": dict(mixer.symbols),
        "limits": dict(mixer.limits),
        "oracle": mixer.oracle,
    }


def _print(c: Card, d_model: int, sizes: dict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Console(highlight=False)
    out.print(f"[bold]{c.name}[/] [dim]({c.family})[/]  {c.title}\n")
    out.print(Text(typeset(c.equation, out.width) + "\n", style="cyan"))
    out.print(f"[bold]Use it when[/] {c.use_when}.")
    if c.writes:
        memory = f"writes {c.writes}; erases {c.erases}; decays: {c.decays}; reads {c.reads}"
        out.print(Text.assemble(("Memory      ", "bold"), typeset(memory)))
    out.print(f"[bold]Paper[/]       {c.paper}")
    out.print(f"[bold]Checked by[/]  {sizes['oracle']}")
    if sizes["symbols"]:
        out.print("[bold]Symbols[/]     " + ", ".join(f"{a} is {b}" for a, b in sizes["symbols"].items()))
    for mode, why in sizes["limits"].items():
        out.print(f"[bold]Cannot[/]      {mode}: {why}")
    out.print(
        f"[bold]Cost[/]        training O({c.train_order}), one token O({c.decode_order}); memory: {c.state_growth}\n"
    )
    table = Table(
        title=f"one layer at d_model {d_model}: {in_words(sizes['parameters'])} parameters",
        title_justify="left",
        box=None,
    )
    for column in ("context", "state (float32)", "flops a token, training", "flops a token, decoding"):
        table.add_column(column, justify="right")
    for T in CONTEXTS:
        row = sizes["state_bytes"][T], sizes["forward_flops_per_token"][T], sizes["step_flops"][T]
        table.add_row(str(T), bytes_in_words(row[0]), in_words(row[1]), in_words(row[2]))
    out.print(table)
    settings = Table(
        title="\nsettings, as in a pattern string: " + f"{c.name}(key=value)", title_justify="left", box=None
    )
    for column in ("name", "default", "meaning"):
        settings.add_column(column)
    for name, (_, default, meaning) in c.fields.items():
        settings.add_row(name, default or "required", meaning)
    out.print(settings)
