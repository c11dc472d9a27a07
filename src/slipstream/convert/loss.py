"""What a model loses on a text that it was not trained on: measured before and after it is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.objective import bits_per_byte
from slipstream.data.source import read_text
from slipstream.data.store import stored
from slipstream.data.text import CONTEXT, TextData
from slipstream.data.tokenizer import encode
from slipstream.data.windows import Windows
from slipstream.models.language_model import LanguageModel
from slipstream.objectives.next_token import NextToken
from slipstream.train.folder import RunFolder

ROWS = 8  # sequences read at once
Passages = list[tuple[Int[Tensor, "B L"], int]]  # sequences, and bytes of what is predicted in them


@dataclass(frozen=True)
class Lost:
    """Per token in nats, and per byte of text in bits."""

    nats: float
    bits_per_byte: float


def passages(model: LanguageModel, run: Path, text: str | None, most: int) -> Passages | None:
    """Some sequences of the text, at most so many tokens; without one, of what the run held out; None where that is not known."""
    return _held_out(run, most) if text is None else _of_text(model, text, most)


def _held_out(run: Path, most: int) -> Passages | None:
    """The last part of the run's own tokens."""
    folder = RunFolder(run.parent if run.suffix == ".safetensors" else run)
    if not folder.settings.is_file():
        return None
    settings = json.loads(folder.settings.read_text(encoding="utf-8"))
    if (tokens := stored(folder.tokens, settings["data_key"])) is None:
        return None
    context = min(settings.get("context") or CONTEXT, len(tokens.ids) // 2 - 1)
    data = TextData(str(run), tokens, context, bytes_per_token=1.0)
    return list(data.validation(ROWS, max(1, most // context)))


def _of_text(model: LanguageModel, source: str, most: int) -> Passages:
    if model.tokenizer is None:
        raise InputError("this model carries no tokenizer, so that no text can be read by it; leave --text out")
    text = read_text(source)
    ids, sizes = encode(model.tokenizer, text.content)
    context = min(CONTEXT, len(ids) - 1)
    if context < 1:
        raise InputError(f"{text.name} is too short to measure on: {len(ids)} tokens; give a longer text")
    return list(Windows(ids, context).spread(sizes, ROWS, max(1, most // context)))


@torch.no_grad()
def loss(model: LanguageModel, read: Passages, on_progress: Callable[[float], None] = lambda share: None) -> Lost:
    """The mean over all predictions. on_progress: told the share done."""
    objective, nats, predictions, n_bytes = NextToken(), 0.0, 0, 0
    for i, (batch, covered) in enumerate(read):
        found = objective.loss(model, batch)
        nats, predictions, n_bytes = nats + found.nats.item(), predictions + found.predictions, n_bytes + covered
        on_progress((i + 1) / len(read))
    return Lost(nats / predictions, bits_per_byte(nats, n_bytes))
