"""slipstream quantise: a trained model in 8 or 4 bits a weight, and what that costs in quality."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from slipstream.cli.settings import verb
from slipstream.convert.config import QuantiseConfig
from slipstream.core.errors import InputError
from slipstream.core.quantities import bytes_in_words

if TYPE_CHECKING:
    from rich.console import Console

    from slipstream.models.language_model import LanguageModel


def add(app: typer.Typer) -> None:
    verb(app, "quantise", QuantiseConfig, run, positional=("run",))


def run(settings: QuantiseConfig) -> None:
    """Keep a trained model's matrices in 8 or 4 bits a weight: fewer bytes, faster tokens, and what is lost, measured.

    Examples:

      slipstream quantise runs/book --to int8 --out runs/book-int8

      slipstream quantise runs/book --to int4 --out runs/book-int4 --text other.txt --json
    """
    if (settings.out / "config.json").exists():
        raise InputError(f"{settings.out} holds a model already; choose another --out")
    from rich.console import Console

    from slipstream.convert.loss import passages
    from slipstream.interop.load import load
    from slipstream.train.folder import written

    model = load(settings.run)
    read = passages(model, settings.run, settings.text, settings.eval_tokens)
    small, facts = _made(model, settings, read, Console(highlight=False, stderr=True))
    with written(settings.out):
        small.save(settings.out)
    facts = {"out": str(settings.out), "to": settings.to, "group": settings.group, **facts}
    typer.echo(json.dumps(facts) if settings.as_json else _in_words(facts))


def _made(model: LanguageModel, settings: QuantiseConfig, read: Any, console: Console) -> tuple[Any, dict[str, Any]]:
    """The quantised model, and bytes and losses before and after."""
    from slipstream.convert.loss import loss
    from slipstream.convert.quantise import quantise, stored_bytes
    from slipstream.report.progress import Overall

    with Overall(console) as overall:
        steps = _Steps(overall.show, 3 if read else 1)
        small = quantise(model, settings.to, settings.group, steps.next("packing"))
        facts: dict[str, Any] = {"bytes": {"before": stored_bytes(model), "after": stored_bytes(small)}}
        if read:
            before, after = (
                loss(model, read, steps.next("reading before")),
                loss(small, read, steps.next("reading after")),
            )
            facts["bits_per_byte"] = {"before": before.bits_per_byte, "after": after.bits_per_byte}
            facts["nats_per_token"] = {"before": before.nats, "after": after.nats}
            facts["tokens_read"] = sum(batch[:, 1:].numel() for batch, _ in read)
    return small, facts


class _Steps:
    """Several jobs one after another on one bar; each is told about by its share."""

    def __init__(self, show: Callable[[float, float, dict[str, str]], None], count: int) -> None:
        self.show, self.count, self.begun, self.started = show, count, 0, time.monotonic()

    def next(self, what: str) -> Callable[[float], None]:
        before, self.begun = self.begun, self.begun + 1

        def tell(share: float) -> None:
            done = (before + share) / self.count
            self.show(done, (time.monotonic() - self.started) * (1 / done - 1) if done else 0.0, {"now": what})

        return tell


def _in_words(facts: dict[str, Any]) -> str:
    size = facts["bytes"]
    lines = [
        f"{bytes_in_words(size['before'])} became {bytes_in_words(size['after'])} in {facts['out']}, "
        f"{size['before'] / size['after']:.1f} times smaller"
    ]
    if "bits_per_byte" in facts:
        bits = facts["bits_per_byte"]
        lines.append(
            f"{bits['before']:.4f} bits per byte before, {bits['after']:.4f} after "
            f"({bits['after'] - bits['before']:+.4f}), on {facts['tokens_read']:,} tokens of held-out text"
        )
    else:
        lines.append("what it loses is not known, for the run kept no text: give --text FILE to measure it")
    return "\n".join([*lines, f'slipstream generate {shlex.quote(facts["out"])} "Once upon"'])
