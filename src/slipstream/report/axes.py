"""Axes of the figures as plotly's plain dicts: ticks at measured values or round numbers, in words, never more than fit a phone.

Colours of text and lines are absent on purpose: the page's stylesheet sets them, so that light, dark and print need no redrawing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil, floor, log2, log10
from typing import Any

from slipstream.core.quantities import bytes_in_words, duration_in_words
from slipstream.report.wording import length

Axis = dict[str, Any]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MOST_TICKS = 6


def layout(x: Axis, y: Axis, y_title: str, **more: Any) -> dict[str, Any]:
    """A quiet frame: no legend (the page draws one), nothing to drag, y's title above its axis to leave the width to the plot."""
    title = {
        "text": y_title,
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "bottom",
        "yshift": 8,
        "xshift": -8,
    }
    annotations = [title, *more.pop("annotations", [])]
    return {
        "autosize": True,
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12},
        "margin": {"l": 8, "r": 14, "t": 30, "b": 8},
        "hoverlabel": {"font": {"family": FONT, "size": 12, "color": "#ffffff"}},
        "xaxis": {**_frame(), **x},
        "yaxis": {**_frame(), **y},
        "annotations": annotations,
        **more,
    }


def _frame() -> Axis:
    return {"fixedrange": True, "zeroline": False, "automargin": True, "ticks": "", "title": {"standoff": 8}}


def plain(title: str = "", **more: Any) -> Axis:
    return {"title": {"text": title, "standoff": 8}, "nticks": MOST_TICKS, **more}


def lengths(values: Iterable[int], title: str) -> Axis:
    """Logarithmic, with a tick at each measured length (every second one where they are many)."""
    known = sorted(set(values))
    step = ceil(len(known) / MOST_TICKS)
    ticks = known[::-1][::step][::-1]
    return _log(title, [float(v) for v in ticks], [length(v) for v in ticks], [float(v) for v in known])


def sizes(values: Iterable[float]) -> Axis:
    """Bytes, logarithmic, ticks at powers of two."""
    known = [v for v in values if v > 0]
    low, high = floor(log2(min(known))), ceil(log2(max(known)))
    step = max(1, ceil((high - low) / (MOST_TICKS - 1)))
    ticks = [2.0**k for k in range(low, high + 1, step)]
    return _log("", ticks, [bytes_in_words(t) for t in ticks], known)


def durations(values: Iterable[float]) -> Axis:
    """Seconds, logarithmic."""
    known = [v for v in values if v > 0]
    ticks = _round_between(min(known), max(known))
    return _log("", ticks, [duration_in_words(t) for t in ticks], known)


def rates(values: Iterable[float], title: str, words: Callable[[float], str]) -> Axis:
    """Anything a second, logarithmic."""
    known = [v for v in values if v > 0]
    ticks = _round_between(min(known) / 1.1, max(known) * 1.1)
    return _log(title, ticks, [words(t) for t in ticks], known, pad=0.14)


def _round_between(low: float, high: float) -> list[float]:
    """The finest of the usual divisions of a power of ten that gives few enough ticks."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**k for k in powers for d in digits if low / 1.05 <= d * 10.0**k <= high * 1.05]
        if len(ticks) <= MOST_TICKS:
            break
    return ticks


def _log(title: str, ticks: list[float], words: list[str], known: list[float], pad: float = 0.04) -> Axis:
    low, high = log10(min(known)), log10(max(known))
    room = max(pad * (high - low), 0.05)
    return {
        "type": "log",
        "title": {"text": title, "standoff": 8},
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": words,
        "range": [low - room, high + room],
    }
