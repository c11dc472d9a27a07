"""The HTML page: one file with everything in it (text, table, figures, plotly), which opens without a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from slipstream.core.files import write_text
from slipstream.core.quantities import bytes_in_words, duration_in_words, in_words
from slipstream.report.columns import cells, columns, definitions
from slipstream.report.figures import figures
from slipstream.report.measure import finite
from slipstream.report.palette import looks
from slipstream.report.picks import picks
from slipstream.report.summary import Record, Row, Summary, cards_of, summarise
from slipstream.report.verdict import answers, caveats
from slipstream.report.wording import digits, rival

TEMPLATES = Path(__file__).parent / "templates"
SYMBOL_PATHS = {  # plotly's markers, for the legend
    "circle": "M8 4.6a3.4 3.4 0 1 0 .01 0z",
    "diamond": "M8 3.6l4.4 4.4L8 12.4 3.6 8z",
    "square": "M4.8 4.8h6.4v6.4H4.8z",
    "triangle-down": "M8 12.2l4.4-7.4H3.6z",
    "pentagon": "M8 3.6l4.3 3.1-1.6 5H5.3l-1.6-5z",
    "triangle-up": "M8 3.8l4.4 7.4H3.6z",
    "x": "M4 5.6L5.6 4 8 6.4 10.4 4 12 5.6 9.6 8l2.4 2.4-1.6 1.6L8 9.6 5.6 12 4 10.4 6.4 8z",
    "star": "M8 3l1.4 3.2 3.6.3-2.7 2.4.8 3.5L8 10.5l-3.1 1.9.8-3.5L3 6.5l3.6-.3z",
}


def write_report(records: list[Record], path: Path) -> None:
    """Write the page in one step: a reader sees the old file or the new one, never half of one."""
    write_text(path, render(summarise(records)))


def render(summary: Summary) -> str:
    """The page of a summary."""
    from plotly.offline import get_plotlyjs

    shown, look = columns(summary), looks(summary.rows)
    drawn = figures(summary)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            title=_title(summary),
            facts=_facts(summary),
            answers=answers(summary),
            picks=picks(summary),
            caveats=caveats(summary),
            columns=shown,
            definitions=definitions(shown),
            body=cells(shown, summary.rows),
            figures=drawn,
            looks=look,
            symbols=SYMBOL_PATHS,
            plots=_json_safe({f.id: {"traces": f.drawn, "layout": f.layout} for f in drawn}),
            command=summary.setup.get("command"),
            settings=_settings(summary.setup),
            machine=_pairs(summary.setup.get("machine") or {}),
            models=[_model(r, summary.state_context) for r in summary.rows],
            moved_after=summary.state_context,
            cards={
                card.name: card for row in summary.rows for card in cards_of(row.arch) if card.family != "feedforward"
            },
            plotly=Markup(get_plotlyjs()),
        )
    )


@cache
def _environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["marked"] = _marked
    env.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return env


def _marked(text: str, chosen: Sequence[str] = ()) -> Markup:
    """Names between backticks become bold (the chosen ones in colour), numbers stay with their units; all else is escaped."""
    chosen = [str(escape(arch)) for arch in chosen]

    def bold(match: re.Match[str]) -> str:
        return f'<b class="arch{" choice" if match[1] in chosen else ""}">{match[1]}</b>'

    marked = re.sub(r"`([^`]*)`", bold, str(escape(text)))
    marked = re.sub(r"(\[[\d.–]+\])", r'<span class="whole">\1</span>', marked)
    return Markup(re.sub(r"(\d) (%|ms|s|B|KiB|MiB|GiB)(?=[\s.,;)]|$)", "\\1\u00a0\\2", marked))


def _title(summary: Summary) -> str:
    data = Path(str(summary.setup.get("data") or "your text")).name
    return f"Which architecture for {data}?"


def _facts(summary: Summary) -> list[str]:
    """The line under the title."""
    setup, n = summary.setup, len(summary.rows)
    said = [f"{n} architecture{'s' if n != 1 else ''}"]
    said += [f"{in_words(float(setup['params']))} parameters each"] if setup.get("params") else []
    said += [f"{in_words(float(setup['tokens']))} tokens of training"] if setup.get("tokens") else []
    said += [_seeds(setup)] if setup.get("seeds") else []
    said += [f"took {duration_in_words(float(setup['seconds']))}"] if setup.get("seconds") else []
    return said


def _seeds(setup: Record) -> str:
    n = len(setup["seeds"]) if isinstance(setup["seeds"], list) else int(setup["seeds"])
    return f"{n} seed{'s' if n != 1 else ''}"


def _settings(setup: Record) -> list[tuple[str, str]]:
    """What was asked for, in words; what a record does not say is left out."""
    equal = {
        "tokens": "every architecture saw the same tokens in the same order",
        "time": "every architecture trained for the same time",
    }
    rows = [
        ("Text", _text(setup)),
        ("Parameters", _count(setup, "params", " in each model, within 2 %")),
        ("Training", _count(setup, "tokens", " tokens")),
        ("Context", _count(setup, "context", " tokens")),
        ("Seeds", ", ".join(map(str, setup["seeds"])) if isinstance(setup.get("seeds"), list) else ""),
        ("Held equal", equal.get(setup.get("equal", ""), "")),
        (
            "For comparison",
            "; ".join(
                f"{rival(k)} {digits(float(v))} bits per byte" for k, v in (setup.get("baseline_bpb") or {}).items()
            ),
        ),
        ("slipstream", setup.get("version") or ""),
    ]
    return [(label, text) for label, text in rows if text]


def _text(setup: Record) -> str:
    size = f", {bytes_in_words(float(setup['data_bytes']))}" if setup.get("data_bytes") else ""
    return f"{setup['data']}{size}" if setup.get("data") else ""


def _count(setup: Record, key: str, unit: str) -> str:
    return f"{setup[key]:,}{unit}" if finite(setup.get(key)) else ""


def _pairs(machine: Record) -> list[tuple[str, str]]:
    """The machine as its record describes it, whatever it lists."""
    return [(str(k).replace("_", " "), text) for k, v in machine.items() if (text := _plain(v))]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{label}: {text}" for label, text in _pairs(value))
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _model(row: Row, context: int | None) -> dict[str, str]:
    """One line of the table of models."""
    m = row.model
    cards = [card for card in cards_of(row.arch) if card.family != "feedforward"]
    alone = cards[0] if len(cards) == 1 else None
    return {
        "arch": row.arch,
        "pattern": m.get("pattern") or "",
        "family": row.family,
        "params": _params(m),
        "moved": bytes_in_words(row.moved[context].value) if context in row.moved else "",
        "shape": " × ".join(str(m[key]) for key in ("n_layers", "d_model") if m.get(key)),
        "d_ff": str(m.get("d_ff") or ""),
        "growth": row.growth,
        "use_when": m.get("use_when") or (alone.use_when if alone else ""),
        "train": _order(m.get("train_order") or (alone.train_order if alone else "")),
        "decode": _order(m.get("decode_order") or (alone.decode_order if alone else "")),
    }


def _params(model: Record) -> str:
    """All, and those that one token uses where they are fewer."""
    total, active = model.get("params"), model.get("active_params")
    if not total:
        return ""
    return f"{total:,} ({active:,} a token)" if active and active < total else f"{total:,}"


def _order(growth: str) -> str:
    return growth.replace("^2", "²")


def _json_safe(value: Any) -> Any:
    """JSON has no NaN and no infinity: a point that was not a number is a gap in its line."""
    if isinstance(value, dict):
        return {k: _json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(v) for v in value]
    return None if isinstance(value, float) and not finite(value) else value
