"""slipstream train: a model on the user's text, in one command that can be stopped and given again."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict

import typer

from slipstream.cli.settings import verb
from slipstream.train.config import TrainConfig


def add(app: typer.Typer) -> None:
    verb(app, "train", TrainConfig, run, positional=("data",))


def run(settings: TrainConfig) -> None:
    """Train a model on a text. The same command again goes on where it stopped.

    Examples:

      slipstream train book.txt

      slipstream train notes/ --arch mamba2 --params 3M --tokens 10M --out runs/notes
    """
    from slipstream.core.quantities import duration_in_words
    from slipstream.train.progress import Screen
    from slipstream.train.run import train

    with Screen() as screen:
        result = train(settings, screen)
    if settings.as_json:
        typer.echo(json.dumps({**asdict(result), "out": str(result.out)}))
        return
    work = f"{result.tokens:,} tokens in {duration_in_words(round(result.seconds))}"
    typer.echo(f"validation {result.bits_per_byte:.3f} bits per byte after {work}")
    typer.echo(f'slipstream generate {shlex.quote(str(result.out))} "Once upon"')
