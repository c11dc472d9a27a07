"""How the time is spent, and what follows from it: the same tokens for every architecture.

The budget is shared between training, the recall probe and the timings. How fast each architecture trains is measured
first; the tokens are then as many as all of them together can read in training's share. The plan is kept, so that an
architecture that is added later trains on the same tokens.
"""

from __future__ import annotations

import lzma
import math
from typing import Any

import numpy as np

from slipstream.compare.config import CompareConfig
from slipstream.data.text import TextData

START = 12.0  # seconds until the workers have begun, and for the report
SHARES = {"quality": 0.35, "recall": 0.45, "speed": 0.20}
QUALITY_OVERHEAD = 1.25  # validations, and the final one, against training alone
LEAST_STEPS = 20


def shares(config: CompareConfig) -> dict[str, float]:
    """Seconds of the budget for each thing that is measured."""
    chosen = {name: SHARES[name] for name in config.measure}
    return {name: max(1.0, config.budget - START) * share / sum(chosen.values()) for name, share in chosen.items()}


def make_plan(config: CompareConfig, data: TextData, paces: dict[str, float], jobs: int) -> dict[str, Any]:
    """Tokens of a training run, seconds of a recall probe, seconds for the timings, and what the text gives away by itself."""
    seconds = shares(config)
    each = jobs * seconds.get("quality", 0) / (config.seeds * QUALITY_OVERHEAD)
    affordable = each / sum(1 / p for p in paces.values()) if paces else 0
    step = config.batch_size * data.context
    tokens = config.tokens or step * max(LEAST_STEPS, math.floor(affordable / step))
    return {
        "tokens": tokens,
        "seconds_each": each / max(1, len(paces)),
        "recall_seconds": jobs * seconds.get("recall", 0) / (len(config.archs) * config.seeds),
        "speed_seconds": seconds.get("speed", 0),
        "context": data.context,
        "baseline_bpb": baselines(data),
    }


def baselines(data: TextData) -> dict[str, float]:
    """Bits per byte of the held-out text without any model: from letter counts, and as xz packs it after the training text."""
    training, held_out = data.training.tokens, data.held_out.tokens
    counts = np.bincount(training, minlength=data.vocab_size) + 1.0
    unigram = float(-np.log2(counts / counts.sum())[held_out].mean() / data.bytes_per_token)
    first, rest = (data.tokenizer.decode(part.tolist()).encode() for part in (training, held_out))
    packed = len(lzma.compress(first + rest, preset=6)) - len(lzma.compress(first, preset=6))
    return {"unigram": unigram, "xz": 8 * packed / max(1, len(rest))}
