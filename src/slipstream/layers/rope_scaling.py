r"""Rotary positions stretched beyond the length they were trained at: other angles a position, and longer queries and keys.

    f_i = b^(-2i/K)                                                    as trained
    linear   f_i / s                                                   (position interpolation, Chen et al. 2023, arXiv:2306.15595)
    llama3   f_i, f_i / s, or between, by how often 2 pi / f_i fits into the trained length     (Llama 3.1)
    yarn     f_i, f_i / s, or between, by the place of i between two numbers of turns; q and k times m
                                                                       (Peng et al. 2023, arXiv:2309.00071, sec. 3.2 and 3.4)

Written in a setting as a name and its numbers: "linear:factor=4", "llama3:factor=8:low=1:high=4:original=8192",
"yarn:factor=40:original=4096". What depends on how long the text is by now (dynamic NTK, LongRoPE) is not here: keys in a
cache were turned when it was shorter, so that an answer would depend on how the text was cut.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cache
from typing import ClassVar

import yaml
from pydantic import Field

from slipstream.core.config import Config
from slipstream.core.errors import InputError, nearest


class RopeScaling(Config, ABC):
    """Abstract. magnitude: the factor on what is turned, queries and keys alike; never on keys that are turned further."""

    kind: ClassVar[str]
    factor: float = Field(gt=0)  # how much longer than trained

    @abstractmethod
    def angles(self, base: float, width: int) -> list[float]:
        """Radians a position, for each pair of `width` channels."""

    @property
    def magnitude(self) -> float:
        return 1.0

    def __str__(self) -> str:
        """As it stands in a setting."""
        return ":".join([self.kind, *(f"{n}={v}" for n, v in self.model_dump(exclude_none=True).items())])


class Linear(RopeScaling):
    """Every angle smaller by the factor."""

    kind = "linear"

    def angles(self, base: float, width: int) -> list[float]:
        return [f / self.factor for f in trained_angles(base, width)]


class Llama3(RopeScaling):
    """Waves shorter than original / high stay, waves longer than original / low are stretched, others in part."""

    kind = "llama3"
    low: float = Field(gt=0)  # turns within the original length below which an angle is divided by the factor
    high: float = Field(gt=0)  # turns above which it stays
    original: float = Field(gt=0)  # tokens it was trained at

    def angles(self, base: float, width: int) -> list[float]:
        return [self._angle(f) for f in trained_angles(base, width)]

    def _angle(self, f: float) -> float:
        turns = self.original * f / (2 * math.pi)
        if turns < self.low or turns > self.high or self.low == self.high:
            return f if turns > self.high else f / self.factor
        kept = (turns - self.low) / (self.high - self.low)
        return kept * f + (1 - kept) * f / self.factor


class Yarn(RopeScaling):
    """Pairs that turn more than beta_fast times within the original length stay, less than beta_slow are stretched."""

    kind = "yarn"
    original: float = Field(gt=0)  # tokens it was trained at
    beta_fast: float = Field(32.0, gt=0)  # turns from which an angle stays
    beta_slow: float = Field(1.0, gt=0)  # turns up to which it is divided by the factor
    m: float | None = None  # factor on q and k; default 0.1 ln(factor) + 1
    truncate: bool = True  # the ramp runs between whole channels

    @property
    def magnitude(self) -> float:
        return yarn_magnitude(self.factor) if self.m is None else self.m

    def angles(self, base: float, width: int) -> list[float]:
        low, high = self._channel(self.beta_fast, base, width), self._channel(self.beta_slow, base, width)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high + 0.001 if low == high else high
        stretched = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(width // 2)]
        return [f * (s / self.factor + 1 - s) for f, s in zip(trained_angles(base, width), stretched)]

    def _channel(self, turns: float, base: float, width: int) -> float:
        """Which pair turns so often within the original length."""
        return width * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """0.1 weight ln(factor) + 1; 1 for what is not stretched."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def trained_angles(base: float, width: int) -> list[float]:
    return [base ** (-2 * i / width) for i in range(width // 2)]


KINDS = {cls.kind: cls for cls in (Linear, Llama3, Yarn)}


@cache
def rope_scaling(spec: str | None) -> RopeScaling | None:
    """What a setting says. Raises InputError for an unknown name or number."""
    if spec is None:
        return None
    name, *numbers = spec.split(":")
    if name not in KINDS:
        raise InputError(f"no rope_scaling is called {name!r}; {nearest(name, KINDS)}")
    return KINDS[name](**{key: yaml.safe_load(value) for key, _, value in (n.partition("=") for n in numbers)})
