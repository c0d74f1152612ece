"""Losses as a picture: one SVG that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 860, 460, 60, 40, 190, 20
COLORS = ("#1f77b4", "#2ca02c", "#d62728", "#ff7f0e", "#9467bd", "#8c564b", "#7f7f7f")
POINTS = 150


def draw(losses: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """A line for each recipe, the mean of its seeds, and the room between its lowest and highest.

    Args:
        losses: by recipe, of each seed, of each step.

    Returns:
        the SVG as text.
    """
    curves = {name: [_smooth(each) for each in runs] for name, runs in losses.items()}
    every = [value for runs in curves.values() for run in runs for value in run[len(run) // 20 :]]
    low, high = min(every), max(every)
    steps = max(len(run) for runs in losses.values() for run in runs)

    def x(place: float) -> float:
        return LEFT + place * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (min(value, high) - low) / ((high - low) or 1.0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        '     font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for number in range(6):
        value, place = low + (high - low) * number / 5, number / 5
        parts += [
            f'<line x1="{x(0)}" x2="{x(1)}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>',
            f'<text x="{x(place):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{round(steps * place)}</text>',
        ]
    for number, (name, runs) in enumerate(curves.items()):
        color, columns = COLORS[number % len(COLORS)], list(zip(*runs, strict=True))
        places = [x(place / max(1, len(columns) - 1)) for place in range(len(columns))]
        upper = [f"{at:.1f},{y(max(column)):.1f}" for at, column in zip(places, columns, strict=True)]
        lower = [f"{at:.1f},{y(min(column)):.1f}" for at, column in zip(places, columns, strict=True)]
        middle = [f"{at:.1f},{y(sum(column) / len(column)):.1f}" for at, column in zip(places, columns, strict=True)]
        parts += [
            f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{color}" opacity="0.15"/>',
            f'<polyline points="{" ".join(middle)}" fill="none" stroke="{color}" stroke-width="1.5"/>',
            f'<text x="{x(1) + 12:.1f}" y="{TOP + 18 + 20 * number}" fill="{color}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _smooth(run: Sequence[float]) -> list[float]:
    """At most POINTS means of neighbouring steps."""
    size = max(1, len(run) // POINTS)
    return [sum(run[start : start + size]) / len(run[start : start + size]) for start in range(0, len(run), size)]
