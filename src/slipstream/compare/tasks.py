"""What a worker does for one architecture: calibrate a training step, train and validate, probe recall."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from slipstream.bench.recall import recall_probe
from slipstream.bench.speed import state_record
from slipstream.compare.workers import Tell
from slipstream.core.cards import card
from slipstream.core.cost import ORDERS
from slipstream.core.objective import bits_per_byte
from slipstream.data.source import read_text
from slipstream.data.text import TextData, text_data
from slipstream.models.checkpoint import load
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import parse
from slipstream.train.config import TrainConfig
from slipstream.train.loop import Point
from slipstream.train.run import prepare, train

WINDOWS = 64  # held-out sequences of the final figure
CALIBRATION = 2.0  # seconds


def calibrate(tell: Tell, config: TrainConfig) -> list[dict[str, Any]]:
    """Training tokens a second, from a few steps after the first."""
    trainer = prepare(config, text_data(config.data, config.tokenizer, config.context))
    trainer.advance()
    times: list[float] = []
    while sum(times) < CALIBRATION or len(times) < 2:
        start = time.perf_counter()
        trainer.advance()
        times.append(time.perf_counter() - start)
        tell(min(1.0, sum(times) / CALIBRATION), "calibrating")
    return [
        {"kind": "pace", "arch": config.arch, "tokens_per_second": trainer.tokens_per_step / statistics.median(times)}
    ]


def quality(tell: Tell, config: TrainConfig, contexts: list[int]) -> list[dict[str, Any]]:
    """Train in the run's folder (going on from what is there), measure the held-out text window by window, and say what the
    model is and what it remembers after so many tokens."""

    def hear(event: object) -> None:
        if isinstance(event, Point):
            tell(0.95 * event.done, f"{event.bits_per_byte:.2f} bits/byte")

    result = train(config, hear)
    points = _metrics(result.out)
    curve = [[p["tokens"], p["seconds"], p["validation"]] for p in points if p.get("validation") is not None]
    model = load(result.out)
    windows = held_out(model, text_data(config.data, config.tokenizer, config.context))
    stderr = statistics.stdev(windows) / len(windows) ** 0.5 if len(windows) > 1 else None
    return [
        {
            "kind": "quality",
            "arch": config.arch,
            "seed": config.seed,
            "val_bpb": statistics.fmean(windows),
            "val_stderr": stderr,
            "val_windows": [round(w, 4) for w in windows],
            "tokens": result.tokens,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens / result.seconds,
            "curve": curve,
            "diverged": False,
            **_experts(points),
        },
        model_record(config.arch, model),
        state_record(config.arch, model, contexts),
    ]


@torch.no_grad()
def held_out(model: LanguageModel, data: TextData) -> list[float]:
    """Bits per byte of up to WINDOWS sequences spread over the held-out part: the same ones for every architecture."""
    found = []
    for batch, n_bytes in data.validation(1, WINDOWS):
        nats = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        found.append(bits_per_byte(nats, n_bytes))
    return found


def _experts(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The load of every expert over training, where there are experts: tokens, and by layer its share of all choices."""
    loads = [[p["tokens"], {at: use["load"] for at, use in p["experts"].items()}] for p in points if p.get("experts")]
    return {"experts": loads} if loads else {}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def model_record(arch: str, model: LanguageModel) -> dict[str, Any]:
    """What a model is: sizes from itself, orders and growth from the cards of its mixers."""
    cards = [card(b.parts[0].name) for b in parse(arch)]
    growths = {c.state_growth for c in cards}
    return {
        "kind": "model",
        "arch": arch,
        "pattern": model.config.pattern,
        "params": model.n_parameters(),
        "active_params": model.n_active_parameters(),
        "n_layers": model.config.n_layers,
        "d_model": model.config.d_model,
        "d_ff": model.config.d_ff,
        "family": cards[0].family if len(cards) == 1 else "hybrid",
        "train_order": max((c.train_order for c in cards), key=ORDERS.index),
        "decode_order": max((c.decode_order for c in cards), key=ORDERS.index),
        "state_growth": growths.pop() if len(growths) == 1 else "mixed",
        "use_when": cards[0].use_when if len(cards) == 1 else "",
    }


def recall(tell: Tell, arch: str, data: str | None, seed: int, seconds: float) -> list[dict[str, Any]]:
    """The recall probe of a small model of this architecture, with facts planted in the user's own text."""
    text = read_text(data).content
    return [
        recall_probe(arch, text, seconds=seconds, seed=seed, on_progress=tell)
        | {"kind": "recall", "arch": arch, "seed": seed}
    ]
