"""A number with what it is known to, and the rules for when two of them differ.

    a and b are apart  <=>  a - b > sqrt((a - low_a)^2 + (high_b - b)^2)      for a >= b

That is the interval for a difference from two separate intervals (Newcombe 1998, method 10; Zou and Donner 2008), which holds
for lopsided intervals of shares as well as for means. Where both were scored on the same samples (windows of one text), what
the samples have in common is taken out: the standard error is that of the differences, sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import hypot, isfinite, sqrt
from statistics import fmean, stdev
from typing import Any, TypeVar

Z = 1.96  # half-width of a 95 % interval in standard errors
ONE_SEED = 0.0025  # deviation over seeds, as a share, assumed where there is only one (published: 0.3 % of perplexity)
TIMING_NOISE = 0.03  # no timing on a shared machine is known better than this share of itself
ONE_TIMING = 0.15  # nor a single one better than this

T = TypeVar("T")


@dataclass(frozen=True)
class Measure:
    """A value with an interval of about 95 %. samples: what it is the mean of; between: standard deviation over runs."""

    value: float
    low: float
    high: float
    samples: tuple[float, ...] = ()
    between: float = 0.0

    def apart(self, other: Measure) -> bool:
        """Whether the two differ by more than their noise."""
        upper, lower = (self, other) if self.value >= other.value else (other, self)
        return upper.value - lower.value > upper._noise(lower)

    def _noise(self, lower: Measure) -> float:
        if len(self.samples) < 2 or len(self.samples) != len(lower.samples):
            return hypot(self.value - self.low, lower.high - lower.value)
        differences = [a - b for a, b in zip(self.samples, lower.samples)]
        return Z * hypot(stdev(differences) / sqrt(len(differences)), self.between, lower.between)

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


def exactly(value: float) -> Measure:
    """A number that was counted, not measured."""
    return Measure(float(value), float(value), float(value))


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def over_seeds(values: Sequence[float], errors: Sequence[float], samples: Sequence[Sequence[float]] = ()) -> Measure:
    """The mean over runs. errors: each run's own standard error; samples: what each run's value is the mean of."""
    mean = fmean(values)
    between = stdev(values) if len(values) > 1 else ONE_SEED * mean
    half = Z * hypot(fmean(errors), between)
    together = tuple(fmean(column) for column in zip(*samples)) if len({len(s) for s in samples}) == 1 else ()
    return Measure(mean, mean - half, mean + half, together, between)


def timing(value: float, spread: float) -> Measure:
    """spread: of the repetitions, to either side; 0 says that there was only one."""
    half = max(float(spread), TIMING_NOISE * value) if spread else ONE_TIMING * value
    return Measure(float(value), float(value) - half, float(value) + half)


def rate(amount: float, seconds: Measure) -> Measure:
    """An amount in so many seconds, as an amount a second."""
    least = max(seconds.low, seconds.value / 10)
    return Measure(amount / seconds.value, amount / seconds.high, amount / least)


def share(parts: Sequence[tuple[float, float]]) -> Measure:
    """Pooled share of (share, trials) of several seeds: Wilson's interval, widened to hold every seed."""
    trials = sum(n for _, n in parts)
    p = sum(part * n for part, n in parts) / trials
    middle, half = p + Z**2 / (2 * trials), Z * sqrt(p * (1 - p) / trials + Z**2 / (4 * trials**2))
    scale = 1 + Z**2 / trials
    seeds = [part for part, _ in parts]
    return Measure(p, min((middle - half) / scale, p, *seeds), max((middle + half) / scale, p, *seeds))


def ranked(items: Sequence[T], get: Callable[[T], Measure | None], lower_is_better: bool) -> list[tuple[T, Measure]]:
    """Those that have the measure, best first."""
    found = [(item, m) for item in items if (m := get(item)) is not None]
    return sorted(found, key=lambda pair: pair[1].value if lower_is_better else -pair[1].value)


def leaders(ranking: Sequence[tuple[T, Measure]]) -> list[tuple[T, Measure]]:
    """The best and those that cannot be told apart from it."""
    return [pair for pair in ranking if not pair[1].apart(ranking[0][1])]
