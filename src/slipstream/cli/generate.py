"""slipstream generate: text out of a trained model, as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import typer

from slipstream.cli.settings import verb
from slipstream.core.errors import InputError
from slipstream.generate.config import GenerateConfig, Sampling


def add(app: typer.Typer) -> None:
    verb(app, "generate", GenerateConfig, run, positional=("run", "prompt"))


def run(settings: GenerateConfig) -> None:
    """Continue a text with a trained model. Only the new text is printed, as it comes.

    Examples:

      slipstream generate runs/book "Once upon" --temperature 0.7 --stop "Chapter"

      slipstream generate runs/book - --save-state read.safetensors --max-new-tokens 0 < long.txt

      slipstream generate runs/book --from-state read.safetensors
    """
    if settings.prompt is None and settings.from_state is None:
        raise InputError(f'give a prompt: slipstream generate {settings.run} "Once upon", or --from-state FILE')
    from slipstream.data.source import read_text
    from slipstream.generate.reading import Reading
    from slipstream.generate.stream import generate
    from slipstream.models.checkpoint import load

    model = load(settings.run)
    prompt = read_text("-").content.decode("utf-8") if settings.prompt == "-" else settings.prompt or ""
    begun = Reading.load(settings.from_state, model) if settings.from_state else None
    how: dict[str, Any] = settings.model_dump(include=set(Sampling.model_fields))
    how |= {"max_new_tokens": settings.max_new_tokens, "stop": settings.stop, "seed": settings.seed}
    stream = generate(model, prompt, state=begun, **how)
    text = _show(stream, quiet=settings.as_json)
    if settings.save_state:
        stream.reading.save(settings.save_state, model)
    if settings.as_json:
        about = {"prompt": prompt, "text": text, "tokens": stream.n_tokens, "ended": stream.ended, "seed": stream.seed}
        typer.echo(json.dumps(about, ensure_ascii=False))


def _show(stream: Iterable[Any], quiet: bool) -> str:
    """Print the pieces as they come, and return them as one."""
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if not quiet:
            print(piece, end="", flush=True)
    if pieces and not quiet:
        print(flush=True)
    return "".join(pieces)
