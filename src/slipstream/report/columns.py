"""The columns of the table: where each number comes from, its unit, what it means and which way is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slipstream.core.quantities import bytes_in_words, in_words
from slipstream.report.measure import Measure, leaders, ranked
from slipstream.report.summary import Row, Summary
from slipstream.report.wording import digits, length, percent


@dataclass(frozen=True)
class Column:
    """priority: a narrow terminal drops the highest first."""

    head: str
    unit: str
    meaning: str
    lower_is_better: bool
    priority: int
    get: Callable[[Row], Measure | None]
    show: Callable[[Measure], str]

    def best(self, rows: list[Row]) -> set[str]:
        """The architectures that lead this column; several when noise hides which. None when all are equal."""
        order = ranked(rows, self.get, self.lower_is_better)
        first = {row.arch for row, _ in leaders(order)}
        return first if len(first) < len(order) else set()


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | None
    best: bool


def columns(summary: Summary) -> list[Column]:
    """Those columns for which at least one architecture has a number."""
    some = [
        _quality(),
        *_recall(summary.far),
        _training(),
        *_prefill(summary),
        *_decode(summary),
        *_state(summary.state_context),
    ]
    return [c for c in some if any(c.get(row) is not None for row in summary.rows)]


def definitions(shown: list[Column]) -> list[tuple[str, str]]:
    """Every meaning once, with the heads that share it."""
    heads: dict[str, list[str]] = {}
    for column in shown:
        heads.setdefault(column.meaning, []).append(column.head)
    return [(", ".join(of), meaning) for meaning, of in heads.items()]


def cells(shown: list[Column], rows: list[Row]) -> list[tuple[Row, list[Cell]]]:
    """The table's body: every row's cells in the order of the columns."""
    best = [c.best(rows) for c in shown]
    return [(row, [_cell(c, row, row.arch in first) for c, first in zip(shown, best)]) for row in rows]


def _cell(column: Column, row: Row, best: bool) -> Cell:
    m = column.get(row)
    return Cell("–", None, False) if m is None else Cell(column.show(m), m.value, best)


def _quality() -> Column:
    meaning = (
        "Mean surprise a byte of the part of the text that was held back; lower is better. "
        "± is 95 % of the error over its windows and the deviation over seeds together (of one seed: 0.25 % is assumed)."
    )
    return Column("quality", "bits per byte", meaning, True, 0, lambda row: row.bpb, _with_error)


def _with_error(m: Measure) -> str:
    return f"{digits(m.value)} ±{float(f'{m.half:.1g}'):g}" if m.half else digits(m.value)


def _recall(far: int | None) -> list[Column]:
    if far is None:
        return []
    meaning = (
        f"Facts planted {far:,} tokens back that come out exactly right, by a small two-layer model of the "
        "same architecture trained to look facts up; in brackets the 95 % interval."
    )
    return [
        Column(f"recall at {length(far)}", "% exact", meaning, False, 1, lambda row: row.recall.get(far), _percent_only)
    ]


def _percent_only(m: Measure) -> str:
    return percent(m).replace(" %", "")


def _training() -> Column:
    meaning = "Tokens trained on a second, forward, backward and update."
    return Column("train", "tokens/s", meaning, False, 3, lambda row: row.train_rate, _count)


def _count(m: Measure) -> str:
    return in_words(m.value)


def _prefill(summary: Summary) -> list[Column]:
    return [_prefill_at(n, 4 if n == summary.prefill_lengths[-1] else 6) for n in summary.prefill_lengths]


def _prefill_at(n: int, priority: int) -> Column:
    meaning = "Tokens read a second in a prompt of that length, batch 1."
    return Column(f"prefill {length(n)}", "tokens/s", meaning, False, priority, lambda row: row.prefill_rate(n), _count)


def _decode(summary: Summary) -> list[Column]:
    return [_decode_at(n, 2 if n == summary.decode_contexts[-1] else 5) for n in summary.decode_contexts]


def _decode_at(n: int, priority: int) -> Column:
    meaning = "Milliseconds to write one token after a text of that length, batch 1."
    return Column(
        f"decode {length(n)}",
        "ms/token",
        meaning,
        True,
        priority,
        lambda row: row.decode.get(n),
        lambda m: digits(m.value),
    )


def _state(context: int | None) -> list[Column]:
    if context is None:
        return []
    meaning = f"What the model keeps of one sequence after {context:,} tokens, in all layers; the weights come on top."
    return [Column(f"state {length(context)}", "bytes", meaning, True, 2, lambda row: row.state.get(context), _size)]


def _size(m: Measure) -> str:
    return bytes_in_words(m.value)
