"""Recall against what is held and against what is read, a line a policy: an SVG that can be read on white and on black."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from slipstream.core.quantities import bytes_in_words

WIDTH, HEIGHT, TOP, BOTTOM = 960, 420, 46, 54
PANELS, LEGEND = ((58, 372), (440, 754)), 778  # left and right edges
GREY, GRID, LINE_HEIGHT = "#6e7781", "#8a949e", 20
FONT = 'font-family="system-ui, -apple-system, \'Segoe UI\', Roboto, Helvetica, Arial, sans-serif" font-size="13"'
HUES = ("#1f77b4", "#d1571b", "#2b8a57", "#b02a6f", "#7a55c7", "#8a6d1c", "#0d8a9e", "#c23b3b")


@dataclass(frozen=True)
class Point:
    """A policy with its budget, and what came of it. recall from 0 to 1."""

    policy: str
    held: float
    read: float
    recall: float

    @property
    def name(self) -> str:
        return self.policy.partition(":")[0]


def figure(points: list[Point]) -> str:
    """Two panels that share their vertical axis and the legend."""
    names = sorted({p.name for p in points}, key=lambda n: (n != "full", n))
    told = "; ".join(f"{p.policy} {p.recall:.0%}" for p in points)
    panels = (("bytes held", [p.held for p in points]), ("keys read for a token", [p.read for p in points]))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'role="img" aria-labelledby="title desc" fill="{GREY}" {FONT}>',
            '<title id="title">Cache policies: facts recalled from 4,000 tokens back</title>',
            f'<desc id="desc">{told}</desc>',
            f'<text x="12" y="{TOP - 22}">facts recalled from 4,000 tokens back</text>',
            *(part for i, (label, xs) in enumerate(panels) for part in panel(i, label, xs, points, names)),
            *(part for i, name in enumerate(names) for part in entry(i, name)),
            "</svg>\n",
        ]
    )


def panel(i: int, label: str, xs: list[float], points: list[Point], names: list[str]) -> list[str]:
    """One pair of axes with every policy's line."""
    left, right = PANELS[i]
    low, high = log2(min(xs)) - 0.3, log2(max(xs)) + 0.3

    def across(x: float) -> float:
        return left + (right - left) * (log2(x) - low) / (high - low)

    parts = [line for percent in (0, 25, 50, 75, 100) for line in level(percent, left, right)]
    for power in range(int(-(-low // 1)), int(high) + 1):
        if power % 2 == 0 or high - low < 6:
            parts.append(f'<text x="{across(2.0**power):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                         f"{bytes_in_words(2**power) if i == 0 else f'{2**power:,}'}</text>")  # fmt: skip
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - BOTTOM + 40}" text-anchor="middle">{label}</text>')
    for n, name in enumerate(names):
        mine = sorted((across(x), down(p.recall)) for x, p in zip(xs, points) if p.name == name)
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in mine)
        parts.append(f'<path d="M{path}" stroke="{HUES[n % len(HUES)]}" stroke-width="2" fill="none"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{HUES[n % len(HUES)]}"/>' for x, y in mine]
    return parts


def level(percent: int, left: int, right: int) -> list[str]:
    """A horizontal line of the grid, and its number."""
    y = down(percent / 100)
    return [
        f'<path d="M{left} {y:.1f}H{right}" stroke="{GRID}" stroke-opacity=".28"/>',
        f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{percent}%</text>',
    ]


def entry(i: int, name: str) -> list[str]:
    """A line of the legend."""
    y, hue = TOP + LINE_HEIGHT * (i + 0.5), HUES[i % len(HUES)]
    return [
        f'<path d="M{LEGEND} {y - 4:.1f}h24" stroke="{hue}" stroke-width="2"/>',
        f'<circle cx="{LEGEND + 12}" cy="{y - 4:.1f}" r="4" fill="{hue}"/>',
        f'<text x="{LEGEND + 34}" y="{y:.1f}" fill="{hue}">{name}</text>',
    ]


def down(recall: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * recall
