"""How much does one sequence keep in memory? Bytes of one layer's state against tokens read, for ten mixers, as an SVG.

    python bench/state_figure.py            writes docs/state_bytes.svg
    python bench/state_figure.py FILE       writes FILE

The numbers are the mixers' own declarations (`state_bytes`; the laws hold them to what is kept), d_model 768, float32.
Text is a grey that can be read on white and on black, since an image cannot know the theme of the page around it.
"""

from __future__ import annotations

import sys
from math import log2
from pathlib import Path

import torch

import slipstream as ss
from slipstream.core.files import write_text
from slipstream.core.quantities import bytes_in_words
from slipstream.report.palette import HUES
from slipstream.report.wording import length

D_MODEL, FIRST, LAST = 768, 2**8, 2**20
DRAWN: tuple[tuple[str, dict[str, int], str], ...] = (  # mixer, settings, label
    ("attention", {}, "attention"),
    ("attention", {"n_kv_heads": 1}, "attention (1 kv head)"),
    ("sliding_window", {}, "sliding_window (256)"),
    ("mamba2", {}, "mamba2"),
    ("retnet", {}, "retnet"),
    ("gated_deltanet", {}, "gated_deltanet"),
    ("rwkv7", {}, "rwkv7"),
    ("tcn", {}, "tcn"),
    ("mamba", {}, "mamba"),
    ("lstm", {}, "lstm"),
)
WIDTH, HEIGHT = 880, 470
LEFT, RIGHT, TOP, BOTTOM = 66, 266, 46, 52  # margins
LOW, HIGH = 2**12, 2**33  # bytes at the ends of the vertical axis
GAP = 18.0  # pixels between labels
GREY, GRID = "#6e7781", "#8a949e"

Line = tuple[str, str, list[tuple[int, int]]]  # label, colour, (tokens, bytes)


def lines() -> list[Line]:
    """Those of DRAWN that this installation has."""
    known = ss.mixers()
    return [(label, HUES[known[n].family], points(known[n], settings)) for n, settings, label in DRAWN if n in known]


def points(cls: type[ss.Mixer], settings: dict[str, int]) -> list[tuple[int, int]]:
    """Weights are not needed to know a state's size, so none are made."""
    with torch.device("meta"):
        mixer = cls(cls.Config(d_model=D_MODEL, **settings))
    lengths = [2**k for k in range(FIRST.bit_length() - 1, LAST.bit_length())]
    return [(n, mixer.state_bytes(n)) for n in lengths]


def across(tokens: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * log2(tokens / FIRST) / log2(LAST / FIRST)


def down(size: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * log2(size / LOW) / log2(HIGH / LOW)


def spread(heights: list[float]) -> list[float]:
    """Sorted heights pushed apart, evenly to both sides, until none is nearer than GAP to the next."""
    heights = list(heights)
    for _ in range(1000):
        for i in range(len(heights) - 1):
            if (short := GAP - (heights[i + 1] - heights[i])) > 0:
                heights[i] -= short / 2
                heights[i + 1] += short / 2
    return heights


def frame() -> list[str]:
    """Grid, ticks and titles."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<text x="{LEFT - 58}" y="{TOP - 22}">bytes one layer keeps of a sequence</text>']
    for k in range(12, 34, 4):
        y = down(2**k)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="{GRID}" stroke-opacity=".28"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{bytes_in_words(2.0**k)}</text>')
    for k in range(8, 21, 2):
        x = across(2**k)
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="{GRID}" stroke-opacity=".28"/>')
        tick = length(2**k) if k < 20 else "1M"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2:.0f}" y="{bottom + 40}" text-anchor="middle">tokens read</text>')
    return parts


def drawn(line: Line, label_y: float) -> list[str]:
    """The line, its end, and its label with a hair between them."""
    label, colour, at = line
    end_x, end_y = across(at[-1][0]), down(at[-1][1])
    path = "L".join(f"{across(n):.1f} {down(size):.1f}" for n, size in at)
    hair = f"M{end_x + 5:.1f} {end_y:.1f}L{end_x + 20:.1f} {label_y:.1f}"
    return [
        f'<path d="M{path}" stroke="{colour}" stroke-width="2.2" fill="none" stroke-linejoin="round"/>',
        f'<circle cx="{end_x:.1f}" cy="{end_y:.1f}" r="3.2" fill="{colour}"/>',
        f'<path d="{hair}" stroke="{colour}" stroke-opacity=".6" fill="none"/>',
        f'<text x="{end_x + 25:.1f}" y="{label_y + 4:.1f}"><tspan fill="{colour}" font-weight="600">{label}</tspan>'
        f'<tspan dx="6">{bytes_in_words(float(at[-1][1]))}</tspan></text>',
    ]


def figure(found: list[Line]) -> str:
    """The SVG's text."""
    found = sorted(found, key=lambda line: -line[2][-1][1])
    labels = spread([down(at[-1][1]) for _, _, at in found])
    told = "; ".join(f"{label} {bytes_in_words(float(at[-1][1]))}" for label, _, at in found)
    body = [part for line, y in zip(found, labels) for part in drawn(line, y)]
    font = 'font-family="system-ui, -apple-system, \'Segoe UI\', Roboto, Helvetica, Arial, sans-serif" font-size="13"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'role="img" aria-labelledby="title desc" fill="{GREY}" {font}>',
            f'<title id="title">State bytes against tokens, one layer, d_model {D_MODEL}, float32</title>',
            f'<desc id="desc">After 1M tokens: {told}.</desc>',
            *frame(),
            *body,
            "</svg>\n",
        ]
    )


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "state_bytes.svg"
    write_text(path, figure(lines()))
    print(path)


if __name__ == "__main__":
    main()
