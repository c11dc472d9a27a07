"""slipstream show NAME: one mixer's equation, memory, cost, settings, source, and when to use it; or a preset's stack and sizes."""

from __future__ import annotations

import json
from typing import Any

import typer

from slipstream.cli.list_ import facts
from slipstream.core.cards import Card, card, cards
from slipstream.core.notation import typeset
from slipstream.core.quantities import bytes_in_words, in_words
from slipstream.models.presets import PRESETS, Preset

CONTEXTS = (512, 8192, 131072)


def add(app: typer.Typer) -> None:
    app.command("show")(show)


def show(
    name: str = typer.Argument(..., help="a name from `slipstream list`, or a preset: jamba, qwen3_next, ..."),
    d_model: int = typer.Option(768, help="width for which memory and cost are printed"),
    as_json: bool = typer.Option(False, "--json", help="as JSON"),
) -> None:
    """Explain one architecture: equation, memory, cost, settings, source, when to use it.

    Examples:

      slipstream show gated_deltanet

      slipstream show mamba --d-model 2048 --json

      slipstream show jamba
    """
    if name in PRESETS and name not in cards():
        _show_preset(name, PRESETS[name], as_json)
        return
    c = card(name)
    sizes = measure(name, d_model)
    if as_json:
        typer.echo(json.dumps(facts(c) | {"d_model": d_model, "sizes": sizes}, indent=2))
    else:
        _print(c, d_model, sizes)
        if name in PRESETS:
            _print_preset(name, PRESETS[name], _published(PRESETS[name]))


def _show_preset(name: str, preset: Preset, as_json: bool) -> None:
    """A preset is no mixer: its stack, and the sizes of the published model."""
    published = _published(preset)
    if as_json:
        about = {"name": name, "title": preset.title, "pattern": preset.pattern, "paper": preset.paper}
        typer.echo(json.dumps(about | {"published": published}, indent=2))
    else:
        _print_preset(name, preset, published)


def _published(preset: Preset) -> dict[str, Any] | None:
    """The published model's sizes, from the live classes without storage."""
    if preset.published is None:
        return None
    from slipstream.models.presets.sizes import sizes

    return {"model": preset.published.model, **preset.published.settings, **sizes(preset.published)}


def _print_preset(name: str, preset: Preset, published: dict[str, Any] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    out.print(f"[bold]{name}[/] [dim](preset)[/]  {preset.title}\n")
    out.print(f"[bold]Pattern[/]     {preset.pattern}")
    out.print(f"[bold]Paper[/]       {preset.paper}")
    if published is None:
        out.print("[bold]Published[/]   no model whose sizes are public")
        return
    size = f"{published['n_layers']} blocks of d_model {published['d_model']}, repeating"
    out.print(f"[bold]Published[/]   {published['model']}: {size} {published['pattern']}")
    active, total = published["active_parameters"], published["parameters"]
    of_them = "all of them" if active == total else f"{in_words(active)} of them"
    out.print(f"[bold]Parameters[/]  {in_words(total)}; a token uses {of_them}\n")
    table = Table(box=None)
    for column in ("context", "state of one sequence (bfloat16)"):
        table.add_column(column, justify="right")
    for T, size in published["state_bytes"].items():
        table.add_row(str(T), bytes_in_words(size))
    out.print(table)


def measure(name: str, d_model: int) -> dict[str, object]:
    """Parameters, state bytes and decode flops of a layer of this width, from the live class without storage."""
    import torch

    from slipstream.core.registry import build

    with torch.device("meta"):
        mixer = build(name, {"d_model": d_model})
    return {
        "parameters": (total := sum(p.numel() for p in mixer.parameters())),
        "active_parameters": total - mixer.idle_parameters(),
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
    total, active = sizes["parameters"], sizes["active_parameters"]
    used = f", {in_words(active)} of them for one token" if active < total else ""
    table = Table(
        title=f"one layer at d_model {d_model}: {in_words(total)} parameters{used}",
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
