"""Where the label of a point goes so that no two lie on each other: tried in turn on a plot as small as a phone's."""

from __future__ import annotations

from math import log

WIDTH, HEIGHT = 250.0, 230.0  # pixels of the plot itself on a narrow phone
LETTER, LINE, GAP = 6.6, 14.0, 8.0
PLACES = (
    "middle right",
    "middle left",
    "top center",
    "bottom center",
    "top right",
    "top left",
    "bottom right",
    "bottom left",
)

Box = tuple[float, float, float, float]


def placed(points: list[tuple[str, float, float]]) -> dict[str, str]:
    """(name, x on a logarithmic axis, y) -> plotly's textposition of each; the place that covers least."""
    at = _pixels(points)
    taken = [(x - GAP, y - GAP, x + GAP, y + GAP) for x, y in at.values()]
    chosen = {}
    for name, (x, y) in sorted(at.items(), key=lambda item: item[1][1]):
        boxes = {place: _box(name, x, y, place) for place in PLACES}
        chosen[name] = min(PLACES, key=lambda place: _covered(boxes[place], taken))
        taken.append(boxes[chosen[name]])
    return chosen


def _pixels(points: list[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    """The points within the axes' padding, y downwards."""
    xs, ys = [log(x) for _, x, _ in points], [y for _, _, y in points]
    across, down = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    return {
        name: (WIDTH * (0.1 + 0.8 * (x - min(xs)) / across), HEIGHT * (0.1 + 0.8 * (max(ys) - y) / down))
        for (name, _, _), x, y in zip(points, xs, ys)
    }


def _box(name: str, x: float, y: float, place: str) -> Box:
    vertical, side = place.split()
    width = LETTER * len(name)
    left = {"left": x - GAP - width, "center": x - width / 2, "right": x + GAP}[side]
    top = {"top": y - GAP - LINE, "middle": y - LINE / 2, "bottom": y + GAP}[vertical]
    return left, top, left + width, top + LINE


def _covered(box: Box, taken: list[Box]) -> float:
    """Area shared with what is there already, and area outside the plot (which is worse)."""
    shared = sum(_overlap(box, other) for other in taken)
    inside = _overlap(box, (0.0, -LINE, WIDTH, HEIGHT + LINE))
    return shared + 3 * ((box[2] - box[0]) * LINE - inside)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
