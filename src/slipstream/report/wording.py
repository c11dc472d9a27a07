"""Numbers and names as the report writes them. Three significant digits; names of architectures stand in backticks."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10

from slipstream.core.quantities import bytes_in_words, in_words
from slipstream.report.measure import Measure


def digits(x: float) -> str:
    """Three significant digits, with thousands separated and no exponent: 2.1 -> 2.10, 12345.6 -> 12,300."""
    rounded = float(f"{x:.2e}")
    places = max(0, 2 - floor(log10(abs(rounded)))) if rounded else 0
    return f"{rounded:,.{places}f}"


def length(tokens: int) -> str:
    """2048 -> 2k (a power of two), 3000 -> 3,000."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def percent(m: Measure) -> str:
    """98.2 % [96.0–99.3]"""
    return f"{100 * m.value:.1f} % [{100 * m.low:.1f}–{100 * m.high:.1f}]"


def size(m: Measure) -> str:
    return bytes_in_words(m.value)


def ms(m: Measure) -> str:
    return f"{digits(m.value)} ms"


def bits(m: Measure) -> str:
    return digits(m.value)


def per_second(m: Measure) -> str:
    return f"{in_words(m.value)} tokens/s"


def name(arch: str) -> str:
    return f"`{arch}`"


def listed(words: Sequence[str], at_most: int = 4) -> str:
    """a, b and c; beyond at_most: a, b, c, d and 3 more."""
    words = [*words[:at_most], f"{len(words) - at_most} more"] if len(words) > at_most else list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def times(ratio: float) -> str:
    """1.31 -> 1.3 times; 1234.5 -> 1,234 times."""
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:,.0f} times"


def rival(baseline: str) -> str:
    """What a simple way of predicting the text is called."""
    return {"unigram": "byte frequencies alone"}.get(baseline, baseline)
