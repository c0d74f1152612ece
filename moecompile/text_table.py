"""Tables as text, for terminals."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def table(headers: Sequence[str], rows: Sequence[tuple[tuple[str, ...], str]], width: int) -> list[str]:
    """Columns as wide as needed; the widest give way, and wrap, where the table would be wider than `width`.

    Between words, if that is enough.
    """
    columns = [[header, *(row[place] for row, _ in rows)] for place, header in enumerate(headers)]
    wanted = [max(map(len, column)) for column in columns]
    words = [max((len(word) for cell in column for word in cell.split(" ")), default=0) for column in columns]
    widths = _narrowed(wanted, words, width)
    if _width(widths) > width:
        widths = _narrowed(wanted, [8] * len(wanted), width)
    lines: list[str] = []
    for cells, details in [(tuple(headers), ""), *rows]:
        wrapped = [_wrapped(cell, size) for cell, size in zip(cells, widths, strict=True)]
        for number in range(max(map(len, wrapped))):
            parts = [part[number] if number < len(part) else "" for part in wrapped]
            lines.append("  " + "  ".join(f"{part:<{size}}" for part, size in zip(parts, widths, strict=True)))
        lines += [f"      {line}" for line in textwrap.wrap(details, width - 6)]
    return lines


def _narrowed(widths: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """Columns' widths where the widest have given way until they are their least or the table fits."""
    narrowed = list(widths)
    while _width(narrowed) > width and (wide := [place for place, size in enumerate(narrowed) if size > least[place]]):
        narrowed[max(wide, key=lambda place: narrowed[place])] -= 1
    return narrowed


def _width(widths: Sequence[int]) -> int:
    """Of a table with such columns."""
    return sum(widths) + 2 * len(widths)


def _wrapped(cell: str, width: int) -> list[str]:
    """A cell's lines: broken at spaces, else after a dot or comma, else anywhere."""
    lines: list[str] = []
    for word in textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False) or [""]:
        rest = word
        while len(rest) > width:
            cut = max(rest.rfind(mark, 0, width) for mark in ".,(") + 1 or width
            lines.append(rest[:cut])
            rest = rest[cut:]
        lines.append(rest)
    return lines
