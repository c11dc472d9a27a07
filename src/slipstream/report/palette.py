"""How an architecture is drawn: one hue and one marker a family, so that relatives look related; members differ in shade and dash.

The hues keep at least 3:1 contrast on white and on near-black and stay apart for the common colour-vision deficiencies
(after Okabe and Ito 2008, darkened where they were too light for white paper).
"""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.report.summary import Row

HUES = {
    "attention": "#d55e00",
    "sparse": "#a8772f",
    "linear": "#b8609a",
    "delta": "#2078b8",
    "ttt": "#c2384f",
    "ssm": "#0b9373",
    "rnn": "#a67f00",
    "conv": "#7b828c",
    "hybrid": "#7d62d0",
}
OTHER = "#7b828c"
SYMBOLS = {
    "attention": "circle",
    "sparse": "pentagon",
    "linear": "square",
    "delta": "diamond",
    "ttt": "cross",
    "ssm": "triangle-up",
    "rnn": "x",
    "conv": "triangle-down",
    "hybrid": "star",
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SHADES = (0.0, 0.28, -0.22, 0.14, -0.12, 0.38)  # towards white where positive, towards black where negative
STROKES = {
    "solid": "none",
    "dash": "6 3",
    "dot": "2 2",
    "dashdot": "6 2 2 2",
    "longdash": "9 3",
    "longdashdot": "9 2 2 2",
}


@dataclass(frozen=True)
class Look:
    colour: str
    dash: str
    symbol: str

    @property
    def stroke(self) -> str:
        """The dash as SVG's stroke-dasharray, for legends."""
        return STROKES[self.dash]


def looks(rows: list[Row]) -> dict[str, Look]:
    """A look for every architecture: the same in every figure, whatever the order of the rows."""
    members: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row.arch):
        members.setdefault(row.family, []).append(row.arch)
    return {arch: _look(family, i) for family, arches in members.items() for i, arch in enumerate(arches)}


def _look(family: str, i: int) -> Look:
    n = i % len(DASHES)
    return Look(_shade(HUES.get(family, OTHER), SHADES[n]), DASHES[n], SYMBOLS.get(family, "circle"))


def _shade(colour: str, by: float) -> str:
    to = 255 if by > 0 else 0
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (to - part) * abs(by)):02x}" for part in parts)
