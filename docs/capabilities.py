"""Write docs/capabilities.md and its figure from docs/capabilities/results.jsonl, which bench/capabilities.py makes.

python docs/capabilities.py            write them
python docs/capabilities.py --check    say which are out of date, and fail
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from capability_claims import SECTIONS, Claim, Section
from extrapolation_figure import figure
from pages import renew

from slipstream.compare.results import Record, Results
from slipstream.core.cards import card
from slipstream.core.quantities import bytes_in_words
from slipstream.models.pattern import parse

DOCS = Path(__file__).parent
FIGURE = "induction_lengths.svg"
HEAD = """# What architectures can and cannot do

Small models of every architecture learn tasks whose answers are known, and are then asked at lengths or loads beyond
those they learned at. The tasks are the ones the papers argue with; what the papers report stands beside what was
measured here.

**How to read it.** Every model has two layers of the mixer (of each mixer, in a hybrid), no feed-forward, a short
convolution of width 4 where the mixer has one, no positions in attention unless the name says so, and a matrix state
of d_model x d_model numbers where its size can be set. All architectures of a task share one recipe, given below it;
nothing was tuned for any of them. Examples are fresh in every step. *Solved* is the number of seeds that answered 99
% of fresh questions at the length or load they learned at; *steps* is the median of what those took. The other
columns are medians over the seeds, with the best seed in brackets where it differs by more than a point: learning is
often all or nothing. *State* is what both layers keep of one row of 256 tokens, in float32.

**What it is not.** The models are hundreds of times smaller than the papers' and learn for a minute of one core. An
architecture that fails here within the budget has not been shown to be unable to: only where a theorem says so is
that known, and the text says which. The other way round, what is solved here is solved.

Made by `python bench/capabilities.py` and `python docs/capabilities.py`; do not edit.
"""


@dataclass(frozen=True)
class Row:
    """All seeds of one architecture at one task."""

    arch: str
    records: list[Record]

    @property
    def solved(self) -> list[int]:
        return [r["steps_to_solve"] for r in self.records if r["steps_to_solve"]]

    def at(self, exam: str) -> list[float]:
        """Accuracy of each seed, or its error where the task is a regression."""
        return [v[0] / v[1] if isinstance(v, list) else v for v in (r["at"][exam] for r in self.records)]


def rows(task: str, records: list[Record]) -> list[Row]:
    """Those who solve it first; then by what they know at the greatest length."""
    chosen = [r for r in records if r["kind"] == task]
    found = [Row(a, [r for r in chosen if r["arch"] == a]) for a in dict.fromkeys(r["arch"] for r in chosen)]
    sign = -1 if task == "adding" else 1
    return sorted(found, key=lambda row: (-len(row.solved) / len(row.records), -sign * total(row), row.arch))


def total(row: Row) -> float:
    """Sum of the medians over all exams: what puts rows that solved as often in order."""
    return sum(median(row.at(exam)) for exam in row.records[0]["at"])


def shown(row: Row, exam: str) -> str:
    """A cell: the median, and the best where it differs."""
    values = row.at(exam)
    if not isinstance(row.records[0]["at"][exam], list):
        return f"{median(values):.2g} ({min(values):.2g})"
    middle, best = round(100 * median(values)), round(100 * max(values))
    return f"{middle} ({best})" if best - middle > 1 else f"{middle}"


def table(section: Section, found: list[Row]) -> str:
    exams = list(found[0].records[0]["at"])
    head = ["architecture", "state", "solved", "steps", *(f"{section.unit} {e}" for e in exams), section.reported_as]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    for row in found:
        steps = str(round(median(row.solved))) if row.solved else "–"
        cells = [
            f"`{row.arch}`", bytes_in_words(row.records[0]["state_bytes"]), f"{len(row.solved)}/{len(row.records)}", steps,
            *(shown(row, e) for e in exams), section.reported.get(row.arch, "–"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recipe(record: Record) -> str:
    """How the models of a table were taught."""
    r = record["recipe"]
    amount = f"{r['tokens']} tokens" if "tokens" in r else f"{r['rows']} rows"
    return (
        f"Recipe: d_model {r['d_model']}, learning rate {r['lr']:g}, batches of {amount}, at most {r['steps']} steps."
    )


def verdict(claim: Claim, found: list[Row]) -> str:
    """A claim of the papers, and whether these results bear it out."""
    holds = claim.holds({row.arch: row.at for row in found})
    return f"- {'not measured yet' if holds is None else 'yes' if holds else '**no**'}: {claim.text}"


def command(section: Section, found: list[Row]) -> str:
    seeds = max(len(row.records) for row in found)
    archs = "; ".join(sorted((row.arch for row in found), key=by_family)) + (";" if len(found) == 1 else "")
    return f'```\npython bench/capabilities.py --task {section.task} --seeds {seeds} --archs "{archs}"\n```'


def by_family(arch: str) -> tuple[str, str]:
    return card(parse(arch)[0].parts[0].name).family, arch


def part(section: Section, records: list[Record]) -> str:
    """One task's section."""
    found = rows(section.task, records)
    head = f"## {section.title}\n\n{section.about}"
    if not found:
        return f"{head}\n\nNot measured yet."
    pieces = [
        head,
        table(section, found),
        f"{recipe(found[0].records[0])} {section.differs}",
        f"Paper: {section.paper}. Borne out here?\n\n" + "\n".join(verdict(c, found) for c in section.claims),
        f"**For you:** {section.means}",
        command(section, found),
    ]
    if section.task == "induction":
        pieces.insert(2, f"![accuracy against length]({FIGURE})")
    return "\n\n".join(pieces)


def files() -> dict[Path, str]:
    """Every generated file and its content."""
    records = Results(DOCS / "capabilities").records()
    text = "\n\n".join([HEAD.rstrip(), *(part(section, records) for section in SECTIONS)]) + "\n"
    lines = {row.arch: row.at for row in rows("induction", records)}
    exams = next((list(r["at"]) for r in records if r["kind"] == "induction"), [])
    drawn = {a: [(int(e), median(at(e))) for e in exams] for a, at in lines.items()}
    return {DOCS / "capabilities.md": text} | ({DOCS / FIGURE: figure(drawn)} if drawn else {})


if __name__ == "__main__":
    renew(files(), "python docs/capabilities.py")
