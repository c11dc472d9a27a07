"""The nine figures, and one for each mixture of experts, as plotly's plain dicts: a question, how to read it, and it in words.

A figure with nothing to show is left out. Every architecture looks the same in all of them (palette.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slipstream.core.quantities import bytes_in_words, duration_in_words, in_words
from slipstream.report import axes, traces
from slipstream.report.labels import placed
from slipstream.report.measure import Measure, finite
from slipstream.report.palette import looks
from slipstream.report.summary import Row, Summary
from slipstream.report.wording import bits, digits

DODGE = 1.2  # the points of all architectures at one x spread over this factor, so that error bars can be told from each other


@dataclass(frozen=True)
class Figure:
    """alt: what a reader who cannot see the figure is told. arches: the legend; none where names stand in the figure."""

    id: str
    question: str
    reading: str
    alt: str
    drawn: list[traces.Trace]
    layout: dict[str, Any]
    arches: list[str]


def figures(summary: Summary) -> list[Figure]:
    """Those that have something to show."""
    makers = (
        loss_by_tokens,
        loss_by_seconds,
        recall_by_distance,
        recall_by_load,
        examples_to_learn,
        prefill_by_length,
        decode_by_context,
        state_by_context,
        quality_by_speed,
    )
    return [figure for make in makers if (figure := make(summary))] + loads_of_experts(summary)


def loss_by_tokens(summary: Summary) -> Figure | None:
    return _loss(
        summary,
        0,
        "loss-tokens",
        "How fast does each learn from the text?",
        "tokens read in training",
        "Lower is better: surprise on text held back. The steep beginning is cut off; where lines cross, more training "
        "changed the order.",
    )


def loss_by_seconds(summary: Summary) -> Figure | None:
    return _loss(
        summary,
        1,
        "loss-seconds",
        "How fast does each learn for the time it takes?",
        "seconds of training",
        "The same runs against the clock: a line that falls early gives the most for a short training.",
    )


def _loss(summary: Summary, axis: int, id: str, question: str, x_title: str, reading: str) -> Figure | None:
    rows, look = [r for r in summary.rows if r.curves], looks(summary.rows)
    if not rows:
        return None
    drawn = [t for row in rows for t in traces.curves(row, axis, look[row.arch])]
    values = [y for t in drawn for y in t["y"] if finite(y)]
    simple = {k: float(v) for k, v in (summary.setup.get("baseline_bpb") or {}).items()}
    low, high = min(values), _top(drawn, max(values))
    room = 0.06 * (high - low) or 0.1
    shapes, notes = traces.levels({k: v for k, v in simple.items() if low - room < v <= high})
    y = axes.plain(range=[low - room, high + room])
    layout = axes.layout(axes.plain(x_title, rangemode="tozero"), y, "bits per byte", shapes=shapes, annotations=notes)
    alt = _told(rows, lambda row: f"{bits(row.bpb)} bits per byte at the end" if row.bpb else "no final value")
    return Figure(id, question, reading, alt, drawn, layout, [row.arch for row in rows])


def _top(drawn: list[traces.Trace], highest: float) -> float:
    """Cut off the steep beginning, so that what the runs come down to fills a third of the height."""
    ends = [last for t in drawn if (last := next((y for y in reversed(t["y"]) if finite(y)), None)) is not None]
    return min(highest, min(ends) + max(3 * (max(ends) - min(ends)), 0.15 * min(ends)))


def recall_by_distance(summary: Summary) -> Figure | None:
    return _recall(
        summary,
        lambda row: row.recall,
        "recall-distance",
        "How far back does each find a fact?",
        "tokens between the fact and the question",
        "Higher is better: share of planted facts that come back exactly, with 95 % intervals. A line that falls has forgotten.",
    )


def recall_by_load(summary: Summary) -> Figure | None:
    return _recall(
        summary,
        lambda row: row.load,
        "recall-load",
        "How many facts can each hold at once?",
        "facts to hold",
        "Higher is better: the more facts there are to keep apart, the sooner a small state breaks; bars are 95 % intervals.",
    )


def _recall(
    summary: Summary, get: Callable[[Row], dict[int, Measure]], id: str, question: str, x_title: str, reading: str
) -> Figure | None:
    rows, look = [r for r in summary.rows if get(r)], looks(summary.rows)
    if not rows:
        return None
    drawn = [
        traces.shares(row, get(row), look[row.arch], DODGE ** ((i + 0.5) / len(rows) - 0.5))
        for i, row in enumerate(rows)
    ]
    y = axes.plain(range=[-4, 104], tickvals=[0, 25, 50, 75, 100])
    layout = axes.layout(axes.lengths((at for row in rows for at in get(row)), x_title), y, "% exact")
    alt = _told(rows, lambda row: f"{100 * get(row)[max(get(row))].value:.0f} % at {max(get(row)):,}")
    return Figure(id, question, reading, alt, drawn, layout, [row.arch for row in rows])


def examples_to_learn(summary: Summary) -> Figure | None:
    """Bars, fewest first; hollow and as long as its budget where the probe was not solved."""
    rows = [row for row in summary.rows if row.solved_after]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: (row.examples_to_solve is None, row.examples_to_solve or 0))
    look = looks(summary.rows)
    drawn = [traces.bar(row, look[row.arch]) for row in rows]
    y = {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": [row.arch for row in rows][::-1],
        "ticksuffix": "  ",
    }
    x = axes.plain("training examples", rangemode="tozero")
    layout = axes.layout(x, y, "", bargap=0.35)
    return Figure(
        "recall-examples",
        "How many examples does it take to learn to look a fact up?",
        "Shorter is better. A hollow bar did not learn it within its budget of examples.",
        _told(rows, traces.solved),
        drawn,
        layout,
        [],
    )


def prefill_by_length(summary: Summary) -> Figure | None:
    return _timed(
        summary,
        lambda row: row.prefill,
        "prefill",
        "How long does it take to read a prompt?",
        "tokens in the prompt",
        "time to read",
        duration_in_words,
        axes.durations,
        "Lower is better, logarithmic: twice the length should cost twice the time; a line that bends up costs more.",
    )


def decode_by_context(summary: Summary) -> Figure | None:
    return _timed(
        summary,
        lambda row: row.decode,
        "decode",
        "What does the next token cost after a long text?",
        "tokens already read",
        "ms a token",
        lambda v: f"{digits(v)} ms",
        lambda values: axes.plain(range=[0, 1.08 * max(values)]),
        "Lower is better: a flat line costs the same however long the text; a rising one looks back at all of it for every token.",
    )


def state_by_context(summary: Summary) -> Figure | None:
    return _timed(
        summary,
        lambda row: row.state,
        "state",
        "How much must it remember?",
        "tokens read",
        "bytes a sequence",
        bytes_in_words,
        axes.sizes,
        "Lower is better, both axes logarithmic: a flat line has a fixed memory, a rising one keeps something of every token.",
    )


def _timed(
    summary: Summary,
    get: Callable[[Row], dict[int, Measure]],
    id: str,
    question: str,
    x_title: str,
    y_title: str,
    words: Callable[[float], str],
    y_axis: Callable[[list[float]], axes.Axis],
    reading: str,
) -> Figure | None:
    rows, look = [r for r in summary.rows if get(r)], looks(summary.rows)
    if not rows:
        return None
    drawn = [traces.measured(row, get(row), look[row.arch], words) for row in rows]
    values = [m.value for row in rows for m in get(row).values()]
    layout = axes.layout(axes.lengths((at for row in rows for at in get(row)), x_title), y_axis(values), y_title)
    if layout["yaxis"].get("type") == "log" and not all(values):
        drawn = [{**t, "y": [y or None for y in t["y"]]} for t in drawn]  # no logarithm of a mixer without a state
    alt = _told(rows, lambda row: f"{words(get(row)[max(get(row))].value)} at {max(get(row)):,}")
    return Figure(id, question, reading, alt, drawn, layout, [row.arch for row in rows])


def quality_by_speed(summary: Summary) -> Figure | None:
    rows, look = [r for r in summary.rows if r.bpb and r.train_rate], looks(summary.rows)
    if not rows:
        return None
    points = [(row.arch, row.train_rate.value, row.bpb.value) for row in rows if row.train_rate and row.bpb]
    positions = placed(points)
    drawn = [traces.point(row, look[row.arch], positions[row.arch]) for row in rows]
    ys = [y for _, _, y in points]
    room = 0.16 * (max(ys) - min(ys)) or 0.05
    layout = axes.layout(
        axes.rates([x for _, x, _ in points], "tokens trained on a second", in_words),
        axes.plain(range=[min(ys) - room, max(ys) + room]),
        "bits per byte",
    )
    alt = _told(
        rows,
        lambda row: (
            f"{bits(row.bpb)} bits per byte at {in_words(row.train_rate.value)} tokens/s"
            if row.bpb and row.train_rate
            else ""
        ),
    )
    return Figure(
        "quality-speed",
        "What do you pay in speed for quality?",
        "Best is the lower right: little surprise, quickly trained. The horizontal axis is logarithmic.",
        alt,
        drawn,
        layout,
        [],
    )


def loads_of_experts(summary: Summary) -> list[Figure]:
    """One for each architecture that has experts: of its first seed."""
    rows = [row for row in summary.rows if row.experts]
    return [_loads(f"experts-{i}", row) for i, row in enumerate(rows)]


def _loads(id: str, row: Row) -> Figure:
    layers = row.experts[-1][1]
    firsts = [sum(len(own) for own in list(layers.values())[:i]) for i in range(len(layers))]
    y = {"autorange": "reversed", "tickvals": firsts, "ticktext": [f"layer {at}  " for at in layers], "showgrid": False}
    layout = axes.layout(
        axes.plain("tokens read in training", rangemode="tozero", showgrid=False), y, "experts, by layer"
    )
    layout["margin"] = {**layout["margin"], "t": 36}
    words = [f"layer {at}: from {_times(min(own), own)} to {_times(max(own), own)}" for at, own in layers.items()]
    return Figure(
        id,
        f"Are the experts of {row.arch} evenly used?",
        "A line an expert, blue where it gets its share, orange where it gets three times that, blank where it gets nothing. "
        "Lines that stay blank or orange are a mixture that collapses.",
        "At the end, in shares: " + "; ".join(words),
        [traces.loads(row)],
        layout,
        [],
    )


def _times(share: float, of: list[float]) -> str:
    return f"{digits(len(of) * share)} times its share"


def _told(rows: list[Row], words: Callable[[Row], str]) -> str:
    return "; ".join(f"{row.arch}: {words(row)}" for row in rows)
