"""Quantities as people write them: 3M parameters, 500k tokens, 5m of time."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def count(text: str | int | float) -> int:
    """3M, 500k, 2.5M, 1e6 or a plain number -> int. Raises ValueError naming the forms that are understood."""
    number, unit = _split(text)
    if unit not in _COUNTS:
        raise ValueError("write a count like 500k, 3M or 1e6")
    return round(number * _COUNTS[unit])


def seconds(text: str | int | float) -> float:
    """90s, 5m, 1.5h or a plain number of seconds -> float."""
    number, unit = _split(text)
    if unit not in _SECONDS:
        raise ValueError("write a time like 90s, 5m or 2h")
    return number * _SECONDS[unit]


def _split(text: str | int | float) -> tuple[float, str]:
    match = re.fullmatch(
        r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]?)\s*", str(text).lower().replace(",", "").replace("_", "")
    )
    if not match:
        raise ValueError("write a number with a unit, like 3M or 5m")
    return float(match[1]), match[2]


def integers(text: str | list[str | int]) -> list[int]:
    """512,2k -> [512, 2000], from one line or several."""
    parts = [text] if isinstance(text, str) else text
    return [count(n) for part in parts for n in (part.split(",") if isinstance(part, str) else [part])]


Integers = Annotated[list[int], BeforeValidator(integers)]
Count = Annotated[int, BeforeValidator(count)]
Seconds = Annotated[float, BeforeValidator(seconds)]


def in_words(n: float) -> str:
    """1234567 -> 1.23M: three digits at most, for tables."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{_rounded(n / size)}{unit}"
    return _rounded(n)


def bytes_in_words(n: float) -> str:
    """1536 -> 1.5 KiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= size:
            return f"{_rounded(n / size)} {unit}"
    return f"{n:.0f} B"


def duration_in_words(seconds: float) -> str:
    """290 -> 4 min 50 s; 1.25 -> 1.25 s; 0.004 -> 4 ms."""
    if 0 < seconds < 1:
        return f"{_rounded(1000 * seconds)} ms"
    if seconds < 60:
        return f"{_rounded(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _rounded(x: float) -> str:
    """Three significant digits, never an exponent: 1020 KiB is short of a MiB and stays 1,020 KiB."""
    return f"{float(f'{x:.3g}'):,g}"
