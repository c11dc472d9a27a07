"""Accuracy against length, a line an architecture, as the text of an SVG: grey lettering that can be read on white and on black."""

from __future__ import annotations

from math import log2

from slipstream.core.cards import card
from slipstream.models.pattern import parse
from slipstream.report.palette import DASHES, HUES, OTHER, STROKES
from slipstream.report.wording import length

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 880, 400, 60, 320, 44, 52
GREY, GRID, LINE_HEIGHT = "#6e7781", "#8a949e", 19
FONT = 'font-family="system-ui, -apple-system, \'Segoe UI\', Roboto, Helvetica, Arial, sans-serif" font-size="13"'

Lines = dict[str, list[tuple[int, float]]]  # architecture -> (length, accuracy)


def figure(lines: Lines) -> str:
    """The best at the greatest length first in the legend."""
    ranked = dict(sorted(lines.items(), key=lambda item: (-sum(a for _, a in item[1]), item[0])))
    lengths = [n for n, _ in next(iter(ranked.values()))]
    told = "; ".join(f"{arch} {at[-1][1]:.0%}" for arch, at in ranked.items())
    height = max(HEIGHT, TOP + BOTTOM + LINE_HEIGHT * len(ranked))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img" aria-labelledby="title desc" fill="{GREY}" {FONT}>',
            '<title id="title">Induction heads: accuracy against length, learned at 256</title>',
            f'<desc id="desc">At {lengths[-1]} tokens: {told}.</desc>',
            *frame(lengths),
            *(part for i, (arch, at) in enumerate(ranked.items()) for part in drawn(arch, at, i, look(arch, ranked))),
            "</svg>\n",
        ]
    )


def look(arch: str, among: Lines) -> tuple[str, str]:
    """The hue of its family, and a dash that tells it from its relatives."""
    relatives = [a for a in sorted(among) if family(a) == family(arch)]
    return HUES.get(family(arch), OTHER), STROKES[DASHES[relatives.index(arch) % len(DASHES)]]


def family(arch: str) -> str:
    return card(parse(arch)[0].parts[0].name).family


def across(n: float, first: int, last: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * log2(n / first) / log2(last / first)


def down(accuracy: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * accuracy


def frame(lengths: list[int]) -> list[str]:
    """Grid, ticks and titles."""
    parts = [f'<text x="{LEFT - 44}" y="{TOP - 20}">answers that are right (median of the seeds)</text>']
    for percent in (0, 25, 50, 75, 100):
        y = down(percent / 100)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}" stroke-opacity=".28"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent}%</text>')
    for n in lengths:
        x = across(n, lengths[0], lengths[-1])
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{GRID}" stroke-opacity=".28"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{length(n)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text x="{middle:.0f}" y="{HEIGHT - BOTTOM + 40}" text-anchor="middle">tokens in a row</text>']


def drawn(arch: str, at: list[tuple[int, float]], i: int, look: tuple[str, str]) -> list[str]:
    """The line, and its place in the legend."""
    colour, dash = look
    first, last = at[0][0], at[-1][0]
    path = "L".join(f"{across(n, first, last):.1f} {down(accuracy):.1f}" for n, accuracy in at)
    style = f'stroke="{colour}" stroke-dasharray="{dash}" stroke-width="2.2" fill="none" stroke-linejoin="round"'
    x, y = WIDTH - RIGHT + 24, TOP + LINE_HEIGHT * (i + 0.5)
    return [
        f'<path d="M{path}" {style}/>',
        f'<path d="M{x} {y - 4:.1f}h26" {style}/>',
        f'<text x="{x + 34}" y="{y:.1f}" fill="{colour}">{arch}<tspan dx="6" fill="{GREY}">{at[-1][1]:.0%}</tspan></text>',
    ]
