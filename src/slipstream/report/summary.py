"""From records to one row an architecture: the only place where the report's numbers are made.

Page, terminal table, figures and verdict all read these rows. Records may be missing (an unfinished comparison, an architecture
that failed): then a row's field is None or empty, and `gaps` says what is missing. Of a record that comes twice the later counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from slipstream.core.cards import Card, cards
from slipstream.report.measure import TIMING_NOISE, Measure, exactly, finite, over_seeds, rate, share, timing

Record = dict[str, Any]
STAGES = {"quality": "bits per byte", "recall": "recall", "speed": "speed", "state": "state bytes"}
LONG = 8192  # tokens; the length that the table quotes where it was measured

LEARNED = 0.7  # accuracy on what it was taught from which a probe has learned to look facts up, if not perfectly


@dataclass
class Row:
    """One architecture. Dicts are keyed by tokens (prefill, decode, state, recall) or by pairs held (load)."""

    arch: str
    family: str = ""
    growth: str = ""  # constant, window, grows or mixed
    model: Record = field(default_factory=dict)
    bpb: Measure | None = None
    seeds: int = 0
    curves: list[list[list[float]]] = field(default_factory=list)  # one a seed: [tokens, seconds, bits per byte]
    experts: list[tuple[float, dict[str, list[float]]]] = field(
        default_factory=list
    )  # tokens; by layer, shares of the load
    train_rate: Measure | None = None
    recall: dict[int, Measure] = field(default_factory=dict)
    load: dict[int, Measure] = field(default_factory=dict)
    solved_after: list[int | None] = field(default_factory=list)  # examples, one a seed; None: not within the budget
    recall_budget: int = 0
    grasped: float = 0.0  # accuracy where it was taught, of the best seed
    prefill: dict[int, Measure] = field(default_factory=dict)  # seconds
    decode: dict[int, Measure] = field(default_factory=dict)  # ms
    state: dict[int, Measure] = field(default_factory=dict)  # bytes
    moved: dict[int, Measure] = field(default_factory=dict)  # bytes, for one more token
    gaps: list[str] = field(default_factory=list)

    def prefill_rate(self, length: int) -> Measure | None:
        """Tokens a second."""
        return rate(float(length), self.prefill[length]) if length in self.prefill else None

    @property
    def never_learned(self) -> bool:
        """The probe was trained and did not learn to look facts up: what it finds says nothing of how far memory reaches."""
        return bool(self.solved_after) and self.examples_to_solve is None and self.grasped < LEARNED

    @property
    def examples_to_solve(self) -> float | None:
        """Mean over the seeds that solved it; None when none did."""
        solved = [n for n in self.solved_after if n is not None]
        return fmean(solved) if solved else None


@dataclass
class Summary:
    """All rows, best bits per byte first, and the lengths at which they are compared."""

    setup: Record
    rows: list[Row]

    @property
    def finished(self) -> bool:
        return bool(self.setup.get("finished", True)) and not any(row.gaps for row in self.rows)

    @property
    def learned(self) -> bool:
        """Whether any model knows more of the text than how often each byte comes."""
        known, counted = self.rows[:1], (self.setup.get("baseline_bpb") or {}).get("unigram")
        return not known or known[0].bpb is None or counted is None or known[0].bpb.value < counted

    @property
    def far(self) -> int | None:
        """The furthest distance at which recall can be compared."""
        return _furthest([row.recall for row in self.rows])

    @property
    def prefill_lengths(self) -> list[int]:
        return _shown([row.prefill for row in self.rows], (512, 2048, LONG))

    @property
    def decode_contexts(self) -> list[int]:
        return _shown([row.decode for row in self.rows], (512, LONG))

    @property
    def state_context(self) -> int | None:
        at = _shown([row.state for row in self.rows], (LONG,))
        return at[-1] if at else None


def summarise(records: Iterable[Record]) -> Summary:
    """One row for every architecture that is asked for or spoken of."""
    records = list(records)
    setup = next((r for r in reversed(records) if r.get("kind") == "setup"), {})
    named = [*setup.get("archs", []), *(r["arch"] for r in records if "arch" in r)]
    rows = [_row(arch, [r for r in records if r.get("arch") == arch]) for arch in dict.fromkeys(named)]
    _set_train_rates(rows, records)
    _set_gaps(rows, [r for r in records if r["kind"] == "failed"])
    return Summary(setup, sorted(rows, key=lambda row: row.bpb.value if row.bpb else float("inf")))


def cards_of(arch: str) -> list[Card]:
    """The cards of the mixers that an architecture (a name or a pattern string) is made of."""
    known = cards()
    return [known[word] for word in dict.fromkeys(re.findall(r"[a-z_][a-z0-9_]*", arch)) if word in known]


def _row(arch: str, records: list[Record]) -> Row:
    row = Row(arch)
    _describe(row, _last(records, "model"))
    _add_quality(row, _by_seed(records, "quality"))
    _add_recall(row, _by_seed(records, "recall"))
    speed = _last(records, "speed")
    row.prefill = {int(n): timing(s, spread) for n, s, spread in speed.get("prefill", [])}
    row.decode = {int(n): timing(ms, spread) for n, ms, spread in speed.get("decode", [])}
    state = _last(records, "state")
    row.state = {int(n): exactly(size) for n, size in state.get("bytes", [])}
    row.moved = {int(n): exactly(size) for n, size in state.get("moved", [])}
    return row


def _last(records: list[Record], kind: str) -> Record:
    return next((r for r in reversed(records) if r["kind"] == kind), {})


def _by_seed(records: list[Record], kind: str) -> list[Record]:
    found = {r.get("seed", 0): r for r in records if r["kind"] == kind}
    return [found[seed] for seed in sorted(found)]


def _describe(row: Row, model: Record) -> None:
    own = cards_of(row.arch)
    sequence = [card for card in own if card.family != "feedforward"]
    families = {card.family for card in sequence}
    row.model = model
    row.family = model.get("family") or (families.pop() if len(families) == 1 else "hybrid" if families else "")
    row.growth = model.get("state_growth") or (sequence[0].state_growth if len(sequence) == 1 else "")


def _add_quality(row: Row, records: list[Record]) -> None:
    row.curves = [r["curve"] for r in records if r.get("curve")]
    row.experts = next(([(float(at), loads) for at, loads in r["experts"]] for r in records if r.get("experts")), [])
    sound = [r for r in records if finite(r.get("val_bpb")) and not r.get("diverged")]
    row.gaps += [f"diverged in training (seed {r.get('seed', 0)})" for r in records if r not in sound]
    row.seeds = len(sound)
    if sound:
        errors = [float(r.get("val_stderr") or 0.0) for r in sound]
        windows = [[float(w) for w in r.get("val_windows") or ()] for r in sound]
        row.bpb = over_seeds([float(r["val_bpb"]) for r in sound], errors, windows)


def _add_recall(row: Row, records: list[Record]) -> None:
    row.recall = _shares(records, "distance", "distance")
    row.load = _shares(records, "load", "pairs")
    row.solved_after = [r["examples_to_solve"] for r in records if "examples_to_solve" in r]
    row.grasped = max((float(r.get("accuracy") or 0.0) for r in records), default=0.0)
    row.recall_budget = max((int(r.get("examples") or 0) for r in records), default=0)


def _shares(records: list[Record], series: str, axis: str) -> dict[int, Measure]:
    points: dict[int, list[Record]] = {}
    for record in records:
        for point in record.get(series) or []:
            points.setdefault(int(point[axis]), []).append(point)
    return {at: _share(points[at]) for at in sorted(points)}


def _share(points: list[Record]) -> Measure:
    """One seed: the interval as it was recorded, where it was. Several: pooled."""
    first = points[0]
    if len(points) == 1 and "low" in first and "high" in first:
        return Measure(float(first["exact"]), float(first["low"]), float(first["high"]))
    return share([(float(p["exact"]), float(p.get("n") or 100)) for p in points])


def _set_gaps(rows: list[Row], failures: list[Record]) -> None:
    """What a row lacks that others have, with the reason where one was given. What nobody has was not asked for."""
    there = {row.arch: _there(row) for row in rows}
    asked = set().union(*there.values())
    for row in rows:
        failed = {
            r["stage"]: r["reason"] for r in failures if r["arch"] == row.arch and r["stage"] not in there[row.arch]
        }
        row.gaps += [f"{stage} failed: {reason}" for stage, reason in failed.items()]
        silent = [words for stage, words in STAGES.items() if stage in asked - there[row.arch] - set(failed)]
        row.gaps += [f"not measured: {', '.join(silent)}"] if silent else []


def _there(row: Row) -> set[str]:
    found = {
        "quality": row.bpb or row.gaps,
        "recall": row.recall,
        "speed": row.prefill or row.decode,
        "state": row.state,
    }
    return {stage for stage, value in found.items() if value}


def _set_train_rates(rows: list[Row], records: list[Record]) -> None:
    """Training speed from one source for all: measured alone where that was done, else as seen while training."""
    alone = {r["arch"]: [float(r["train"])] for r in records if r["kind"] == "speed" and finite(r.get("train"))}
    seen: dict[str, list[float]] = {}
    for r in records:
        if r["kind"] == "quality" and finite(r.get("tokens_per_second")):
            seen.setdefault(r["arch"], []).append(float(r["tokens_per_second"]))
    for row in rows:
        if values := (alone or seen).get(row.arch):
            row.train_rate = timing(fmean(values), max((max(values) - min(values)) / 2, TIMING_NOISE * fmean(values)))


def _furthest(series: list[dict[int, Measure]]) -> int | None:
    """The largest key that all share that have any; failing that the largest of all."""
    filled = [set(s) for s in series if s]
    if not filled:
        return None
    return max(set.intersection(*filled) or set.union(*filled))


def _shown(series: list[dict[int, Measure]], wanted: tuple[int, ...]) -> list[int]:
    """The wanted lengths that were measured; if the longest was not, the first, middle and last of those that were."""
    known = sorted(set().union(*series)) if series else []
    if not known or wanted[-1] in known:
        return [n for n in wanted if n in known]
    if len(wanted) == 1:
        return known[-1:]
    places = [known[0], known[len(known) // 2], known[-1]] if len(wanted) == 3 else [known[0], known[-1]]
    return list(dict.fromkeys(places))
