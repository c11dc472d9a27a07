"""Widths for a number of parameters, so that architectures are compared at equal size.

Depth and width follow from the size alone, the same for every pattern; the feed-forwards fill what the mixers leave.
A pattern without feed-forwards, or whose mixers need more than their share, gets its width from a search instead.
"""

from __future__ import annotations

import torch

from slipstream.core.errors import InputError
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import parse

TOLERANCE = 0.02
STEP = 16  # widths are multiples of this: every default head count divides them
FEWEST_FF = 16


def sized(
    pattern: str, params: int, vocab_size: int, n_layers: int | None, d_model: int | None, **settings: object
) -> ModelConfig:
    """Settings of a model with `params` parameters within 2 %. Raises InputError with what was reached when none is."""
    n_layers = n_layers or max(len(parse(pattern)), depth(params))
    first = d_model or width(params, n_layers, vocab_size)
    tried = []
    for candidate in [first] if d_model else _outward(first):
        config = ModelConfig(pattern=pattern, n_layers=n_layers, d_model=candidate, vocab_size=vocab_size, **settings)
        found = _fill(config, params)
        tried.append((abs(n_parameters(found) - params), found))
        if tried[-1][0] <= TOLERANCE * params:
            return found
    best = min(tried, key=lambda t: t[0])[1]
    raise InputError(
        f"{pattern!r} cannot be {params} parameters within 2 % (vocabulary {vocab_size}, {n_layers} layers); nearest: "
        f"{n_parameters(best)} at d_model {best.d_model}. Ask for that, or another n_layers"
    )


def depth(params: int) -> int:
    """Layers by size: 4 below 2M parameters, then growing with the fourth root, in steps of four."""
    return max(4, 4 * round((params / 2e6) ** 0.25))


def width(params: int, n_layers: int, vocab_size: int) -> int:
    """d_model that solves 12 n_layers d^2 + vocab_size d = params, as a multiple of 32 (64 from 256 on)."""
    a, b = 12 * n_layers, vocab_size
    d = (-b + (b * b + 4 * a * params) ** 0.5) / (2 * a)
    step = 64 if d >= 256 else 32
    return max(STEP, step * round(d / step) or STEP)


def n_parameters(config: ModelConfig) -> int:
    """Counted on a model without storage."""
    with torch.device("meta"):
        return LanguageModel(config).n_parameters()


def _outward(first: int) -> list[int]:
    """Widths around the first guess, nearest first."""
    reach = range(STEP, max(2 * first, 8 * STEP), STEP)
    return sorted({first, *reach}, key=lambda d: abs(d - first))


def _fill(config: ModelConfig, params: int) -> ModelConfig:
    """The d_ff that brings the model nearest to params: the count is linear in it. Unchanged without feed-forwards."""
    low, high = (n_parameters(config.model_copy(update={"d_ff": d})) for d in (FEWEST_FF, 2 * FEWEST_FF))
    if low == high:
        return config
    slope = (high - low) / FEWEST_FF
    d_ff = FEWEST_FF + (params - low) / slope
    fine = 8 if d_ff * slope * 0.5 * 8 / max(d_ff, 1) < TOLERANCE * params else 1
    return config.model_copy(update={"d_ff": max(FEWEST_FF, fine * round(d_ff / fine))})
