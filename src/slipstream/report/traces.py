"""How one architecture is drawn in each kind of figure, as plotly's plain dicts. What it looks like is palette.py's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slipstream.core.quantities import in_words
from slipstream.report.measure import Measure
from slipstream.report.palette import Look
from slipstream.report.summary import Row
from slipstream.report.wording import digits, rival

Trace = dict[str, Any]


def curves(row: Row, axis: int, look: Look) -> list[Trace]:
    """The mean over seeds; with several, each seed thinly behind it."""
    words = "%{x:,.0f} tokens" if axis == 0 else "%{x:.3~s} s"
    mean = _line(
        row,
        look,
        [p[axis] for p in _mean(row.curves)],
        [p[2] for p in _mean(row.curves)],
        f"<b>{row.arch}</b><br>%{{y:.3f}} bits per byte after {words}<extra></extra>",
    )
    mean["marker"]["maxdisplayed"] = 8
    seeds = row.curves if len(row.curves) > 1 else []
    thin = [
        _line(row, look, [p[axis] for p in c], [p[2] for p in c], "")
        | {"mode": "lines", "opacity": 0.3, "hoverinfo": "skip", "line": {"color": look.colour, "width": 1}}
        for c in seeds
    ]
    return [*thin, mean]


def _mean(curves: list[list[list[float]]]) -> list[list[float]]:
    """Point by point, at the token counts that every seed has."""
    by_tokens = [{p[0]: p for p in curve} for curve in curves]
    shared = [t for t in by_tokens[0] if all(t in points for points in by_tokens)]
    return [[sum(points[t][i] for points in by_tokens) / len(by_tokens) for i in range(3)] for t in shared]


def levels(simple: dict[str, float]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A dotted line for each simple rival."""
    shapes = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": v,
            "y1": v,
            "layer": "below",
            "line": {"width": 1, "dash": "dot", "color": "#888888"},
        }
        for v in simple.values()
    ]
    notes = [
        {
            "xref": "paper",
            "x": 1,
            "xanchor": "right",
            "y": v,
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 11},
            "text": f"{rival(k)} {digits(v)}",
        }
        for k, v in simple.items()
    ]
    return shapes, notes


def shares(row: Row, points: dict[int, Measure], look: Look, dodge: float) -> Trace:
    found = list(points.values())
    trace = _line(
        row,
        look,
        [at * dodge for at in points],
        [100 * m.value for m in found],
        f"<b>{row.arch}</b><br>%{{y:.1f}} % exact at %{{customdata}}<extra></extra>",
    )
    bars = {
        "type": "data",
        "symmetric": False,
        "thickness": 1,
        "width": 0,
        "array": [100 * (m.high - m.value) for m in found],
        "arrayminus": [100 * (m.value - m.low) for m in found],
        "color": look.colour,
    }
    return {**trace, "error_y": bars, "customdata": [f"{at:,}" for at in points]}


def solved(row: Row) -> str:
    if row.examples_to_solve is None:
        return f"not within {in_words(float(row.recall_budget))}"
    unsolved = sum(n is None for n in row.solved_after)
    return in_words(row.examples_to_solve) + (
        f", {unsolved} of {len(row.solved_after)} seeds never" if unsolved else ""
    )


def bar(row: Row, look: Look) -> Trace:
    learned = row.examples_to_solve is not None
    marker = {"color": look.colour if learned else "rgba(0,0,0,0)", "line": {"color": look.colour, "width": 1.5}}
    return {
        "type": "bar",
        "orientation": "h",
        "y": [row.arch],
        "x": [row.examples_to_solve or row.recall_budget],
        "marker": marker,
        "name": row.arch,
        "text": [solved(row)],
        "textposition": "auto",
        "insidetextanchor": "end",
        "constraintext": "none",
        "textangle": 0,
        "insidetextfont": {"color": "#ffffff" if learned else "#808080"},
        "cliponaxis": False,
        "hovertemplate": f"<b>{row.arch}</b><br>{solved(row)} examples<extra></extra>",
    }


def measured(row: Row, points: dict[int, Measure], look: Look, words: Callable[[float], str]) -> Trace:
    trace = _line(
        row,
        look,
        [float(at) for at in points],
        [m.value for m in points.values()],
        f"<b>{row.arch}</b><br>%{{customdata}} tokens<extra></extra>",
    )
    return {**trace, "customdata": [f"{words(m.value)} at {at:,}" for at, m in points.items()]}


def point(row: Row, look: Look, position: str) -> Trace:
    x, y = (m.value if m else None for m in (row.train_rate, row.bpb))
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": row.arch,
        "x": [x],
        "y": [y],
        "text": [row.arch],
        "textposition": position,
        "cliponaxis": False,
        "marker": {"color": look.colour, "symbol": look.symbol, "size": 11},
        "textfont": {"size": 12},
        "hovertemplate": f"<b>{row.arch}</b><br>%{{y:.3f}} bits per byte<br>%{{x:,.3s}} tokens/s<extra></extra>",
    }


SHARES = [[0, "rgba(32,120,184,0)"], [1 / 3, "rgba(32,120,184,0.55)"], [1, "#d55e00"]]  # nothing, an even share, three


def loads(row: Row) -> Trace:
    """Experts of all layers above one another, the first on top, over training: how many times its share each gets."""
    names = [f"{layer} · {e}" for layer, first in row.experts[0][1].items() for e in range(len(first))]
    times = [[len(own) * p for own in by_layer.values() for p in own] for _, by_layer in row.experts]
    return {
        "type": "heatmap",
        "name": row.arch,
        "x": [at for at, _ in row.experts],
        "y": list(range(len(names))),
        "z": [list(line) for line in zip(*times)],
        "text": [[name] * len(times) for name in names],
        "zmin": 0,
        "zmax": 3,
        "colorscale": SHARES,
        "ygap": 1 if len(names) <= 64 else 0,
        "colorbar": {
            "thickness": 10,
            "outlinewidth": 0,
            "tickvals": [0, 1, 2, 3],
            "ticktext": ["unused", "its share", "twice", "3 or more"],
        },
        "hovertemplate": "layer %{text}<br>%{z:.2f} times its share<br>after %{x:,.0f} tokens<extra></extra>",
    }


def _line(row: Row, look: Look, x: list[float], y: list[float], hover: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": row.arch,
        "x": x,
        "y": y,
        "hovertemplate": hover,
        "line": {"color": look.colour, "width": 2, "dash": look.dash},
        "marker": {"color": look.colour, "symbol": look.symbol, "size": 7},
    }
