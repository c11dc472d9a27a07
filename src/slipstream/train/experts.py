"""What the experts of a model do while it is trained: numbers for the metrics, and a warning in words where they collapse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypedDict

import torch
from torch import Tensor

from slipstream.core.auxiliary import Collector, Usage
from slipstream.models.language_model import LanguageModel

PATIENCE = 50  # steps in a row after which what is wrong is no accident
TIMES = 5  # the share of one expert that is too much
NEARLY_ALL = 0.9  # of the tokens: too much for one expert, where shares are large


class Use(TypedDict):
    """Of one layer in one step. load: each expert's share of all choices; entropy: of these, 1 where all are even; dropped:
    share of the choices that were not served."""

    load: list[float]
    entropy: float
    dropped: float


def told(model: LanguageModel, collector: Collector) -> dict[str, Use] | None:
    """By the place of the layer ("block.mixer"), in order. None of a model without experts."""
    return {at: _use(usage) for at, usage in _placed(model, collector)} or None


def _placed(model: LanguageModel, collector: Collector) -> Iterator[tuple[str, Usage]]:
    for place in model.stack.places():
        if place.mixer in collector.usage:
            yield place.at, collector.usage[place.mixer]


def _use(usage: Usage) -> Use:
    total = max(1, int(usage.load.sum()))
    shares = [n / total for n in usage.load.tolist()]
    entropy = -sum(p * math.log(p) for p in shares if p) / max(math.log(len(shares)), 1e-9)
    return Use(
        load=[round(p, 4) for p in shares], entropy=round(entropy, 4), dropped=round(float(usage.dropped) / total, 4)
    )


class Watch:
    """Looks at every step, and warns once of each expert that is overloaded or idle for long."""

    def __init__(self) -> None:
        self.overloaded: dict[str, Tensor] = {}  # steps in a row, by expert
        self.idle: dict[str, Tensor] = {}

    def look(self, model: LanguageModel, collector: Collector) -> list[str]:
        """Warnings that this step gives rise to."""
        said = []
        for at, usage in _placed(model, collector):
            load = usage.load.cpu()
            over = _streak(self.overloaded, at, load > _too_much(load, usage.tokens))
            idle = _streak(self.idle, at, load == 0)
            said += [_overload(at, e, load, usage.tokens) for e in _now(over)]
            if none := _now(idle):
                said.append(_idleness(at, none, len(load)))
        return said


def _streak(kept: dict[str, Tensor], at: str, now: Tensor) -> Tensor:
    kept[at] = (kept.get(at, torch.zeros(len(now), dtype=torch.long)) + 1) * now
    return kept[at]


def _now(streak: Tensor) -> list[int]:
    """Experts whose patience ends with this step."""
    return (streak == PATIENCE).nonzero().flatten().tolist()


def _too_much(load: Tensor, tokens: int) -> float:
    mean = float(load.sum()) / len(load)
    limit = min(TIMES * mean, NEARLY_ALL * tokens)
    return limit if limit > 2 * mean else math.inf  # where most are chosen anyway, none is chosen too often


def _overload(at: str, e: int, load: Tensor, tokens: int) -> str:
    times, share = float(load[e]) * len(load) / float(load.sum()), float(load[e]) / max(1, tokens)
    return (
        f"expert {e} of layer {at} takes {times:.1f} times its share ({share:.0%} of the tokens) for {PATIENCE} steps now: "
        f"{REMEDY}"
    )


def _idleness(at: str, experts: list[int], of: int) -> str:
    names = ", ".join(map(str, experts))
    return f"{len(experts)} of {of} experts of layer {at} got nothing for {PATIENCE} steps ({names}): {REMEDY}"


REMEDY = "the mixture collapses; raise balance_loss, or choose selection_bias=true or a lower learning rate"
