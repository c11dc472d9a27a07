"""The verdict in words: five questions answered from the numbers, and what the answers do not show.

A lead that noise can explain (measure.py) is called a tie. Every answer gives the figure and the runner-up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from slipstream.core.quantities import duration_in_words
from slipstream.report.measure import Measure, leaders, ranked
from slipstream.report.summary import Row, Summary
from slipstream.report.wording import bits, digits, listed, ms, name, per_second, percent, rival, size, times

Kind = Literal["clear", "tie", "open", "missing"]
RELIABLE = 0.9  # recall whose interval starts below this is not to be relied on
LEARNED = 0.5  # recall below this at its best: nobody finds the facts


@dataclass(frozen=True)
class Answer:
    """kind: one is ahead, several share the lead, the numbers settle nothing, or there are none."""

    question: str
    text: str
    kind: Kind
    arches: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Question:
    words: str
    get: Callable[[Row], Measure | None]
    lower_is_better: bool
    show: Callable[[Measure], str]
    after: str  # what the figure is of, once, after the first


def answers(summary: Summary) -> list[Answer]:
    """The five questions, in the order of the page."""
    return [_quality(summary), _recall(summary), _prefill(summary), _decode(summary), _memory(summary)]


def _quality(summary: Summary) -> Answer:
    asked = _Question("Which predicts this text best?", lambda row: row.bpb, True, bits, " bits per byte")
    found = _answer(asked, summary.rows)
    if summary.learned:
        return found
    return replace(found, text=f"None beats byte frequencies alone yet; so far {found.text}", kind="open")


def _recall(summary: Summary) -> Answer:
    far, words = summary.far, "Which still finds facts planted far back?"
    asked = _Question(words, lambda row: row.recall.get(far or 0), False, percent, f" exact at {far or 0:,} tokens")
    found = _answer(asked, summary.rows)
    order = ranked(summary.rows, asked.get, False)
    if order and all(row.never_learned for row, _ in order):
        return Answer(words, "Not settled: none learned to look facts up in the time given.", "open")
    if order and order[0][1].value < LEARNED:
        best = f"{name(order[0][0].arch)} with {percent(order[0][1])}"
        return Answer(
            words, f"None of them, at this size and with this little training: the best is {best}{asked.after}.", "open"
        )
    return found


def _prefill(summary: Summary) -> Answer:
    at = max(summary.prefill_lengths, default=0)

    def shown(m: Measure) -> str:
        return f"{duration_in_words(at / m.value)} ({per_second(m)})"

    asked = _Question(
        "Which reads a long prompt fastest?", lambda row: row.prefill_rate(at), False, shown, f" for {at:,} tokens"
    )
    return _answer(asked, summary.rows)


def _decode(summary: Summary) -> Answer:
    at = max(summary.decode_contexts, default=0)
    words = "Which writes fastest after a long prompt?"
    return _answer(
        _Question(words, lambda row: row.decode.get(at), True, ms, f" a token after {at:,} tokens"), summary.rows
    )


def _memory(summary: Summary) -> Answer:
    at = summary.state_context or 0
    asked = _Question(
        "Which remembers in the least memory?", lambda row: row.state.get(at), True, size, f" at {at:,} tokens"
    )
    found, order = _answer(asked, summary.rows), ranked(summary.rows, lambda row: row.state.get(at), True)
    if found.kind == "missing" or order[-1][1].value <= order[0][1].value:
        return found
    most, m = order[-1]
    told_already = len(order) == len(found.arches) + 1
    last = "" if told_already else f"; the most is {name(most.arch)} with {size(m)}"
    ratio = f", {times(m.value / order[0][1].value)} as much" if order[0][1].value else ""
    return replace(found, text=f"{found.text[:-1]}{last}{ratio}.")


def _answer(asked: _Question, rows: list[Row]) -> Answer:
    order = ranked(rows, asked.get, asked.lower_is_better)
    if not order:
        return Answer(asked.words, "Not measured.", "missing")
    first = leaders(order)
    arches = tuple(row.arch for row, _ in first)
    behind = order[len(first)] if len(first) < len(order) else None
    if len(order) == 1:
        return Answer(
            asked.words, f"{_one(asked, first[0], asked.after)}; there is nothing to compare it with.", "open", arches
        )
    if len(first) == 1:
        return Answer(asked.words, f"{_one(asked, first[0], asked.after)}{_next(asked, behind)}.", "clear", arches)
    shared = listed([_one(asked, pair, asked.after if i == 0 else "") for i, pair in enumerate(first)])
    every = "All of them tie" if behind is None else "A tie"
    why = "the difference is within the noise" if first[-1][1].value != first[0][1].value else "the same figure"
    return Answer(asked.words, f"{every}: {shared} ({why}){_next(asked, behind)}.", "tie", arches)


def _one(asked: _Question, pair: tuple[Row, Measure], after: str) -> str:
    return f"{name(pair[0].arch)} with {asked.show(pair[1])}{after}"


def _next(asked: _Question, pair: tuple[Row, Measure] | None) -> str:
    return f"; next is {_one(asked, pair, '')}" if pair else ""


def caveats(summary: Summary) -> list[str]:
    """What the reader should not conclude, starting with what is wrong in this very comparison."""
    return [*_unfinished(summary), *_weak_models(summary), *_unlearned(summary), *_standing(summary)]


def _unfinished(summary: Summary) -> list[str]:
    said = (
        []
        if summary.setup.get("finished", True)
        else ["This comparison is not finished; the same command goes on from here."]
    )
    said += [f"{name(row.arch)}: {gap}." for row in summary.rows for gap in row.gaps]
    if not any(row.bpb or row.recall or row.prefill for row in summary.rows):
        said.append("Nothing has been measured yet.")
    return said


def _weak_models(summary: Summary) -> list[str]:
    best = summary.rows[0] if summary.rows else Row("")
    simple = summary.setup.get("baseline_bpb") or {}
    if best.bpb is None or not simple:
        return []
    beaten = [f"{rival(key)} ({digits(float(value))})" for key, value in simple.items() if value < best.bpb.value]
    if not beaten:
        return []
    return [
        f"Even the best model ({bits(best.bpb)} bits per byte) predicts worse than {listed(beaten)}: "
        "with more training the order may well change."
    ]


def _unlearned(summary: Summary) -> list[str]:
    """A probe that never learned to look facts up says nothing of how far back its memory reaches."""
    arches = [name(row.arch) for row in summary.rows if row.never_learned]
    if not arches:
        return []
    low = "low recall there may be slow learning, not forgetting."
    return [f"{listed(arches, at_most=8)} did not learn to look facts up in the time given: {low}"]


def _standing(summary: Summary) -> list[str]:
    setup = summary.setup
    said: list[str] = []
    if not any(row.bpb or row.prefill or row.recall for row in summary.rows):
        return said
    if setup.get("params") and setup.get("tokens"):
        said.append(
            f"Models of {setup['params']:,} parameters after {setup['tokens']:,} tokens: orders at this size often "
            "change with more of either. Trust large gaps, and measure again near the size you will use."
        )
    if max((row.seeds for row in summary.rows), default=0) == 1:
        said.append(
            "One seed: how much another start of training changes is assumed, not measured (`--seeds 3` measures it)."
        )
    said.append(
        "Times are of one machine, batch 1 and this implementation; another machine, above all a GPU, can order them differently."
    )
    if any(row.recall for row in summary.rows):
        said.append(
            "Recall is of small models trained only to look facts up: it shows what a memory can hold, not what a model "
            "of this text has learned to use."
        )
    return said
