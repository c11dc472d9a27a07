"""slipstream export: a trained model as a folder that other programs load."""

from __future__ import annotations

import json
import shlex

import typer

from slipstream.cli.settings import verb
from slipstream.interop.config import ExportConfig


def add(app: typer.Typer) -> None:
    verb(app, "export", ExportConfig, run, positional=("run",))


def run(settings: ExportConfig) -> None:
    """Write a model in another format: as a family that transformers has its own class for, when it is one.

    Examples:

      slipstream export runs/book --format hf --out book-hf

      slipstream export runs/book --format gguf --out book.gguf

      slipstream export path/of/a/llama --format slipstream --out runs/llama
    """
    from slipstream.interop.export import export

    written = export(settings)
    if settings.as_json:
        typer.echo(json.dumps({"out": str(settings.out), "format": settings.format, "model_type": written}))
        return
    typer.echo(f"written to {settings.out} as {written}")
    if settings.format == "hf":
        typer.echo(f'AutoModelForCausalLM.from_pretrained("{settings.out}")')
    else:
        typer.echo(f'slipstream generate {shlex.quote(str(settings.out))} "Once upon"')
