"""Answers as a person would judge them: right, blurred (a value of another fact), or from nowhere; and what n of them prove."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

from jaxtyping import Int
from torch import Tensor

Z = 1.959964  # standard errors to either side of a 95 % interval


@dataclass(frozen=True)
class Score:
    """How many of n answers were exact, and how many named a value planted for another key."""

    exact: int = 0
    near: int = 0
    n: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.exact + other.exact, self.near + other.near, self.n + other.n)

    @property
    def accuracy(self) -> float:
        return self.exact / self.n if self.n else 0.0

    def record(self) -> dict[str, Any]:
        """Shares of exact, near and absent, and the 95 % interval of the exact share."""
        low, high = wilson(self.exact, self.n)
        near = self.near / self.n if self.n else 0.0
        absent = (self.n - self.exact - self.near) / self.n if self.n else 0.0
        return {"exact": self.accuracy, "near": near, "absent": absent, "low": low, "high": high, "n": self.n}


def score(predicted: Int[Tensor, "B Q"], answers: Int[Tensor, "B Q"], planted: Int[Tensor, "B P"]) -> Score:
    """Count. A row's planted values are all that stood in it, the right one among them."""
    exact = predicted == answers
    near = (predicted[..., None] == planted[:, None]).any(-1) & ~exact
    return Score(int(exact.sum()), int(near.sum()), exact.numel())


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927): it never leaves 0..1, and says something at 0 and at n hits too."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z * Z
    middle, half = p + z2 / (2 * n), Z * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))
