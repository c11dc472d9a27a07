"""Which one for what, and why: six situations, each a rule on the measured numbers.

A pick for speed or memory must predict within QUALITY_SLACK of the best; a pick that cannot be relied on for facts says so.
Thresholds follow the published crossovers: below about 2k tokens attention costs nothing that is worth saving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slipstream.core.quantities import duration_in_words
from slipstream.report.measure import Measure, leaders, ranked
from slipstream.report.summary import Row, Summary
from slipstream.report.verdict import RELIABLE
from slipstream.report.wording import bits, listed, ms, name, per_second, percent, size

QUALITY_SLACK = 1.05  # bits per byte against the best
STATE_SLACK = 1.25  # bytes against the fewest: nearer than this, the better predictor is taken
SHORT_SLACK = 1.25  # decoding time on short texts against the fastest


@dataclass(frozen=True)
class Pick:
    use: str
    arch: str | None
    why: str


def picks(summary: Summary) -> list[Pick]:
    """Those of the six situations that the numbers can speak to; without quality there is nothing to choose between speeds."""
    rules = (_facts, _many_users, _device, _reading, _short, _prediction) if summary.learned else (_facts,)
    return [pick for rule in rules if (pick := rule(summary))]


def _facts(summary: Summary) -> Pick | None:
    use, far = "Facts must survive word for word", summary.far
    if far is None:
        return None
    order = ranked(summary.rows, lambda row: row.recall.get(far), False)
    reliable = [pair for pair in leaders(order) if pair[1].low >= RELIABLE]
    if not reliable:
        told = f"the best, {name(order[0][0].arch)}, gives {percent(order[0][1])} exact at {far:,} tokens"
        return Pick(
            use, None, f"none here is safe: {told}. Keep the facts outside the model, or measure again with more time"
        )
    best, m = _cheapest(reliable, summary)
    rest = next(((row, r) for row, r in order if r.apart(order[0][1])), None)
    against = f"; the next, {name(rest[0].arch)}, gives {percent(rest[1])}" if rest else ""
    return Pick(use, best.arch, f"{percent(m)} exact at {far:,} tokens{_with_state(best, summary)}{against}")


def _cheapest(tied: list[tuple[Row, Measure]], summary: Summary) -> tuple[Row, Measure]:
    """Of those that cannot be told apart, the one with the smallest state."""
    at = summary.state_context or 0
    return min(tied, key=lambda pair: pair[0].state[at].value if at in pair[0].state else float("inf"))


def _most_accurate(tied: list[tuple[Row, Measure]]) -> tuple[Row, Measure]:
    return min(tied, key=lambda pair: pair[0].bpb.value if pair[0].bpb else float("inf"))


def _with_state(row: Row, summary: Summary) -> str:
    at = summary.state_context or 0
    return f" with {size(row.state[at])} of state" if at in row.state else ""


def _many_users(summary: Summary) -> Pick | None:
    at = summary.state_context
    order = ranked(_good(summary), lambda row: row.state.get(at or 0), True)
    if at is None or len(order) < 2:
        return None
    worst, most = ranked(summary.rows, lambda row: row.state.get(at), False)[0]
    small = [pair for pair in order if pair[1].value <= STATE_SLACK * order[0][1].value]
    best, least = _most_accurate(small)
    against = f"against {size(most)} for {name(worst.arch)}"
    why = f"its state is {size(least)} a user at {at:,} tokens {against}{_decoding(best, summary)}"
    return Pick("Long prompts, many users at once", best.arch, why + _warning(best, summary))


def _decoding(row: Row, summary: Summary) -> str:
    """What a token costs at both ends of the context."""
    at = [n for n in summary.decode_contexts if n in row.decode]
    if not at:
        return ""
    first, last = row.decode[at[0]], row.decode[at[-1]]
    if len(at) > 1 and not last.apart(first):
        return f", and a token costs {ms(last)} whatever the context"
    return f", and a token costs {ms(last)} after {at[-1]:,} tokens"


def _device(summary: Summary) -> Pick | None:
    at, context = summary.state_context, max(summary.decode_contexts, default=0)
    bounded = [row for row in _good(summary) if row.growth in ("constant", "window")]
    order = ranked(bounded, lambda row: row.decode.get(context), True)
    if not order:
        return None
    best, m = _cheapest(leaders(order), summary)
    memory = f" and never more than {size(best.state[at])} of state" if at and at in best.state else ""
    return Pick(
        "A phone or an edge device, one user",
        best.arch,
        f"{ms(m)} a token after {context:,} tokens{memory}{_warning(best, summary)}",
    )


def _reading(summary: Summary) -> Pick | None:
    at = max(summary.prefill_lengths, default=0)
    return _fastest(summary, "Long documents read once (sorting, summarising)", at, lambda row: row.prefill_rate(at))


def _fastest(summary: Summary, use: str, at: int, get: Callable[[Row], Measure | None]) -> Pick | None:
    order = ranked(_good(summary), get, False)
    if not order:
        return None
    first = leaders(order)
    best, m = _most_accurate(first)
    others = [name(row.arch) for row, _ in first if row is not best]
    level = f"; {listed(others)} read{'s' if len(others) == 1 else ''} as fast" if others else ""
    return Pick(
        use,
        best.arch,
        f"{duration_in_words(at / m.value)} for {at:,} tokens ({per_second(m)}){level}{_warning(best, summary)}",
    )


def _short(summary: Summary) -> Pick | None:
    """Attention where it costs nothing that matters; else the best predictor."""
    at = min(summary.decode_contexts, default=0)
    order = ranked(_good(summary), lambda row: row.decode.get(at), True)
    if not order or at > 2048:
        return None
    use, (fastest, least) = f"Short texts (up to about {at:,} tokens)", order[0]
    fine = next(((row, m) for row, m in order if row.growth == "grows" and m.value <= SHORT_SLACK * least.value), None)
    if fine:
        pace = (
            "nothing that predicts as well is faster"
            if fine[0] is fastest
            else f"the fastest, {name(fastest.arch)}, takes {ms(least)}"
        )
        return Pick(
            use,
            fine[0].arch,
            f"its growing memory costs little here: {ms(fine[1])} a token at {at:,} tokens ({pace}), and every fact stays in reach",
        )
    best, m = _most_accurate(leaders(order))
    return Pick(use, best.arch, f"{ms(m)} a token at {at:,} tokens{_warning(best, summary)}")


def _prediction(summary: Summary) -> Pick | None:
    order = ranked(summary.rows, lambda row: row.bpb, True)
    if len(order) < 2:
        return None
    first = leaders(order)
    best, m = max(first, key=lambda pair: pair[0].train_rate.value if pair[0].train_rate else 0.0)
    speed = f" while training at {per_second(best.train_rate)}" if best.train_rate else ""
    level = (
        f", the fastest to train of the {len(first)} that tie for the best"
        if len(first) > 1 and best.train_rate
        else ""
    )
    return Pick("Only the prediction counts", best.arch, f"{bits(m)} bits per byte{speed}{level}")


def _good(summary: Summary) -> list[Row]:
    """Rows that predict nearly as well as the best; all when quality was not measured."""
    known = [row for row in summary.rows if row.bpb]
    if not known:
        return summary.rows
    limit = QUALITY_SLACK * known[0].bpb.value if known[0].bpb else float("inf")
    return [row for row in known if row.bpb and row.bpb.value <= limit]


def _warning(row: Row, summary: Summary) -> str:
    far = summary.far
    m = row.recall.get(far) if far is not None else None
    if far is None or m is None or m.low >= RELIABLE:
        return ""
    if row.never_learned:
        return ". Whether it keeps exact facts is open: its probe did not learn to look them up"
    return f". Not for exact facts: it found {percent(m)} at {far:,} tokens"
