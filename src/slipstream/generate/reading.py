"""A reading: all a model knows after some tokens, as one thing that can be kept on disk and continued later."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from torch import Tensor

from slipstream.core.errors import InputError, nearest
from slipstream.core.state import State
from slipstream.models.captured_step import CapturedStep
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
from slipstream.ops.valid import valid_mask


@dataclass(frozen=True)
class Reading:
    """state: after the last token. logits: for the token after it. seen: tokens of the vocabulary that have occurred.

    shown, held: the last tokens whose text is out, and those that wait for the rest of a character (one row only).
    """

    state: State
    logits: Float[Tensor, "B V"]
    seen: Bool[Tensor, "B V"]
    shown: tuple[int, ...] = ()
    held: tuple[int, ...] = ()

    def rows(self, index: Tensor) -> Reading:
        return replace(self, state=self.state.rows(index), logits=self.logits[index], seen=self.seen[index])

    def clone(self) -> Reading:
        return replace(self, state=self.state.clone())

    def save(self, path: str | Path, model: LanguageModel) -> None:
        """Write a safetensors file that only the same model can continue."""
        rest = State({"logits": self.logits, "seen": self.seen}, self.state.length)
        whole = State.join({"model": self.state, "reading": rest}, self.state.length)
        about = {"shown": json.dumps(self.shown), "held": json.dumps(self.held)}
        whole.save(path, {**about, **_fingerprint(model)})

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel) -> Reading:
        """Read what save wrote. Raises InputError when it is missing, damaged or of another model."""
        path = Path(path)
        if not path.is_file():
            others = [p.name for p in path.parent.glob("*") if p.is_file()]
            hint = nearest(path.name, others) if others else "--save-state writes one"
            raise InputError(f"no state file {path}; {hint}")
        whole = State.load(path)
        with safe_open(path, framework="pt") as stored:
            about = stored.metadata() or {}
        _refuse_other(path, about, model)
        whole = whole.to(next(model.parameters()).device)
        rest = whole.scope("reading")
        shown, held = (tuple(json.loads(about[name])) for name in ("shown", "held"))
        return cls(whole.scope("model"), rest["logits"], rest["seen"], shown, held)


def _fingerprint(model: LanguageModel) -> dict[str, str]:
    """What tells one model from another: its settings, and a hash of a few rows of each weight."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return {"config": model.config.model_dump_json(), "weights": digest.hexdigest()[:16]}


def _refuse_other(path: Path, about: dict[str, str], model: LanguageModel) -> None:
    here = _fingerprint(model)
    about = about | ({"config": _as_now(about["config"])} if "config" in about else {})
    if "config" not in about:
        raise InputError(f"{path} is a bare state without its last logits; --save-state writes what can be continued")
    if about["config"] != here["config"]:
        there, now = json.loads(about["config"]), json.loads(here["config"])
        names = [n for n in {**there, **now} if there.get(n) != now.get(n)]
        told = ", ".join(f"{n} {there.get(n)!r} there, {now.get(n)!r} here" for n in names)
        raise InputError(f"{path} is a state of another model: {told}; continue it with the model it was made with")
    if about["weights"] != here["weights"]:
        raise InputError(f"{path} was made with other weights of this model (trained on since?); read the text again")


def _as_now(config: str) -> str:
    """Settings that came later have their defaults in a state of before."""
    try:
        return ModelConfig(**json.loads(config)).model_dump_json()
    except (InputError, ValueError, TypeError):
        return config


def start(model: LanguageModel, rows: int, state: State | None = None) -> Reading:
    """Nothing read yet, or a bare state as model.prefill gives it, whose tokens are no longer known."""
    first = next(model.parameters())
    vocab = model.config.vocab_size
    logits = torch.zeros(rows, vocab, dtype=first.dtype, device=first.device)
    seen = torch.zeros(rows, vocab, dtype=torch.bool, device=first.device)
    return Reading(model.init_state(rows) if state is None else state, logits, seen)


@torch.no_grad()
def read(
    model: LanguageModel,
    reading: Reading,
    tokens: Int[Tensor, "B T"],
    lengths: Int[Tensor, "B"] | None = None,
    chunk: int = 512,
) -> Reading:
    """The reading after more tokens, in chunks of bounded memory. lengths: right-padded rows."""
    lengths = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device) if lengths is None else lengths
    state, logits = model.reserve(reading.state, tokens.shape[1]), reading.logits
    for at in range(0, tokens.shape[1], chunk):
        part = tokens[:, at : at + chunk]
        real = (lengths - at).clamp(0, part.shape[1])
        ragged = None if bool((real == part.shape[1]).all()) else real
        last, state = model.prefill(part, state, ragged, "last")
        assert last is not None, "logits were asked for"
        logits = torch.where(real[:, None] > 0, last[:, 0], logits)
    rows, columns = valid_mask(lengths, tokens.shape[1]).nonzero(as_tuple=True)
    seen = reading.seen.clone()
    seen[rows, tokens[rows, columns]] = True
    return replace(reading, state=state, logits=logits, seen=seen)


@torch.no_grad()
def write(step: CapturedStep, reading: Reading, tokens: Int[Tensor, "B"]) -> Reading:
    """The reading after one more token a row, by the recurrent step. Its state is the one that the step keeps."""
    logits, state = step(tokens[:, None], reading.state)
    return replace(reading, state=state, logits=logits[:, 0], seen=reading.seen.scatter(1, tokens[:, None], True))
