"""slipstream generate: text out of a trained model, as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from slipstream.cli.settings import verb
from slipstream.core.errors import InputError
from slipstream.core.quantities import bytes_in_words, in_words
from slipstream.generate.config import GenerateConfig, Sampling

if TYPE_CHECKING:
    from slipstream.generate.stream import Stream


def add(app: typer.Typer) -> None:
    verb(app, "generate", GenerateConfig, run, positional=("run", "prompt"))


def run(settings: GenerateConfig) -> None:
    """Continue a text with a trained model. Only the new text is printed, as it comes.

    Examples:

      slipstream generate runs/book "Once upon" --temperature 0.7 --stop "Chapter"

      slipstream generate runs/book - --save-state read.safetensors --max-new-tokens 0 < long.txt

      slipstream generate runs/book --from-state read.safetensors

      slipstream generate runs/book "Once upon" --quantise int8

      slipstream generate path/of/a/model "Who was Ada Lovelace?" --chat --temperature 0

      slipstream generate runs/book - --cache h2o:512 --prefill-policy minference < long.txt
    """
    if settings.prompt is None and settings.from_state is None:
        raise InputError(f'give a prompt: slipstream generate {settings.run} "Once upon", or --from-state FILE')
    import torch

    from slipstream.data.source import read_text
    from slipstream.generate.reading import Reading
    from slipstream.generate.stream import generate
    from slipstream.interop.load import load
    from slipstream.models.policies import with_policies
    from slipstream.models.threads import fitting_threads, writing

    model = load(settings.run, settings.dtype)
    if settings.quantise:
        from slipstream.convert.quantise import quantise

        model = quantise(model, settings.quantise)
    if policies := settings.policies():
        model = with_policies(model, **policies)
    torch.set_num_threads(settings.threads or fitting_threads(writing(model)))
    prompt = read_text("-").content.decode("utf-8") if settings.prompt == "-" else settings.prompt or ""
    begun = Reading.load(settings.from_state, model) if settings.from_state else None
    how: dict[str, Any] = settings.model_dump(include=set(Sampling.model_fields))
    how |= {"max_new_tokens": settings.max_new_tokens, "stop": settings.stop, "seed": settings.seed}
    said: Any = [{"role": "user", "content": prompt}] if settings.chat else prompt
    stream = generate(model, said, state=begun, **how)
    text = _show(stream, quiet=settings.as_json)
    if settings.save_state:
        stream.reading.save(settings.save_state, model)
    cost = _cost(stream) if policies else {}
    if settings.as_json:
        about = {"prompt": prompt, "text": text, "tokens": stream.n_tokens, "ended": stream.ended, "seed": stream.seed}
        typer.echo(json.dumps(about | policies | cost, ensure_ascii=False))
    elif policies:
        typer.echo(_in_words(policies, cost), err=True)


def _cost(stream: Stream) -> dict[str, float]:
    """What the policies come to, after all that was read and written."""
    from slipstream.models.policies import keys_read

    tokens, held = stream.held
    return {"tokens_read": tokens, "bytes_held": held, "keys_read": keys_read(stream.model, tokens)}


def _in_words(policies: dict[str, Any], cost: dict[str, float]) -> str:
    names = ", ".join(f"{name} {said if isinstance(said, str) else ', '.join(said)}" for name, said in policies.items())
    return (
        f"{names}: {bytes_in_words(cost['bytes_held'])} held after {cost['tokens_read']:,} tokens, "
        f"{in_words(cost['keys_read'])} keys read a token (mean over the layers)"
    )


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
