"""Timing so that a disturbance hits all alike: repetitions outside, competitors inside, medians, and how far they scatter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MOST = 15  # repetitions; more say nothing new


@dataclass(frozen=True)
class Timing:
    """seconds: the median. spread: half the distance between the quartiles, 0 for a single run. busy: CPU time over wall time
    (median): below the number of threads where something else took a core."""

    seconds: float
    spread: float
    runs: int
    busy: float = 0.0


def interleaved(
    work: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 1,
    on_round: Callable[[int], None] = lambda n: None,
) -> dict[str, Timing]:
    """Run all competitors in turn, again and again, until the time is up, `least` rounds at least.

    The first round warms up and is discarded, unless the time allows no more than `least`.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    worked: dict[str, list[float]] = {name: [] for name in work}
    start, rounds = time.perf_counter(), 0
    while rounds < least or (rounds <= MOST and _another(start, rounds, seconds)):
        for name, run in work.items():
            began, cpu = time.perf_counter(), time.process_time()
            run()
            taken[name].append(time.perf_counter() - began)
            worked[name].append(time.process_time() - cpu)
        rounds += 1
        on_round(rounds)
    first = 1 if rounds > least else 0
    return {name: summary(t[first:], worked[name][first:]) for name, t in taken.items()}


def _another(start: float, rounds: int, seconds: float) -> bool:
    """Whether one more round of the usual length ends in time."""
    spent = time.perf_counter() - start
    return spent + spent / max(1, rounds) <= seconds


def summary(taken: list[float], worked: list[float] | None = None) -> Timing:
    """Median and half the interquartile range; worked: CPU seconds of the same runs."""
    busy = statistics.median(w / t for w, t in zip(worked, taken)) if worked else 0.0
    if len(taken) == 1:
        return Timing(taken[0], 0.0, 1, busy)
    low, _, high = statistics.quantiles(taken, n=4, method="inclusive")
    return Timing(statistics.median(taken), (high - low) / 2, len(taken), busy)


def ratio(a: Timing, b: Timing) -> float:
    """How many times longer a takes than b."""
    return a.seconds / b.seconds
