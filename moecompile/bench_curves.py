"""Losses as a picture: one SVG that needs nothing beside itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT = 900, 60, 240
PANELS, HEIGHT, GAP = (20, 300), 600, 280
"""Where panels begin, and how high the picture and each of them with its axis is."""
COLORS = ("#1f77b4", "#17becf", "#2ca02c", "#d62728", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
POINTS, DIFFERENCES = 150, 40
"""How many means of neighbouring steps a line has: of losses, and of differences, which are noisier."""
FARTHEST = 2.0
"""Per cent: what is further off than this, either way, stays on the edge, so that what is not can be told apart."""

Runs = Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Panel:
    """A part of the picture with axes of its own.

    Attributes:
        top: where it begins.
        low: the least value.
        high: the largest.
        places: of a line.
    """

    top: int
    low: float
    high: float
    places: int

    def at(self, place: float, value: float) -> str:
        """The point of a line."""
        return f"{self.x(place / max(1, self.places - 1)):.1f},{self.y(value):.1f}"

    def x(self, share: float) -> float:
        """Of the steps."""
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Of a value, those outside on the edge."""
        share = (min(max(value, self.low), self.high) - self.low) / ((self.high - self.low) or 1.0)
        return self.top + (1 - share) * (GAP - 40)


def draw(losses: Runs, against: str) -> str:
    """Losses, and below them how far each recipe is from one of them, relative, in per cent.

    A line for each recipe, the mean of its seeds, and the room between its lowest and highest. Differences
    beyond FARTHEST are on the edge.

    Args:
        losses: by recipe, of each seed, of each step.
        against: the recipe whose runs of the same seeds the others are compared with.

    Returns:
        the SVG as text.
    """
    steps = max(len(run) for runs in losses.values() for run in runs)
    right = [_means(run, DIFFERENCES) for run in losses[against]]
    apart = {
        name: [
            [_difference(one, other) for one, other in zip(_means(run, DIFFERENCES), base, strict=True)]
            for run, base in zip(runs, right, strict=True)
        ]
        for name, runs in losses.items()
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        '     font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_panel(PANELS[0], {name: [_means(run, POINTS) for run in runs] for name, runs in losses.items()}, steps, ""),
        *_panel(PANELS[1], apart, steps, "%"),
    ]
    for number, name in enumerate(losses):
        x, y = WIDTH - RIGHT + 12, PANELS[0] + 18 + 20 * number
        parts.append(f'<text x="{x}" y="{y}" fill="{_color(number)}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _difference(loss: float, right: float) -> float:
    """In per cent, within what is drawn; NaN stays."""
    found = 100 * (loss / right - 1)
    return found if math.isnan(found) else min(max(found, -FARTHEST), FARTHEST)


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _panel(top: int, curves: Runs, steps: int, unit: str) -> list[str]:
    """The axes and the lines; what the first twentieth of the steps does may leave the panel."""
    every = [value for runs in curves.values() for run in runs for value in run[len(run) // 20 :]]
    finite = [value for value in every if abs(value) < float("inf")] or [0.0]
    places = max(len(run) for runs in curves.values() for run in runs)
    panel, parts = Panel(top, min(finite), max(finite), places), list[str]()
    for number in range(6):
        share = number / 5
        value = panel.low + (panel.high - panel.low) * share
        x, y = panel.x(share), panel.y(value)
        parts += [
            f'<line x1="{panel.x(0)}" x2="{panel.x(1)}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}{unit}</text>',
            f'<text x="{x:.1f}" y="{top + GAP - 22}" text-anchor="middle">{round(steps * share)}</text>',
        ]
    for number, runs in enumerate(curves.values()):
        columns = list(enumerate(zip(*runs, strict=True)))
        upper = [panel.at(place, max(column)) for place, column in columns]
        lower = [panel.at(place, min(column)) for place, column in columns]
        middle = [panel.at(place, sum(column) / len(column)) for place, column in columns]
        parts += [
            f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{_color(number)}" opacity="0.12"/>',
            f'<polyline points="{" ".join(middle)}" fill="none" stroke="{_color(number)}" stroke-width="1.5"/>',
        ]
    return parts


def _means(run: Sequence[float], points: int) -> list[float]:
    """At most so many means of neighbouring steps; the last steps that make no whole one are left out."""
    size = -(-len(run) // points)
    return [sum(run[start : start + size]) / size for start in range(0, len(run) - size + 1, size)]
