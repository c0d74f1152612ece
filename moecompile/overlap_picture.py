"""What is predicted, or was measured, of ordered graphs (`overlap`), as a picture (SVG) for a browser or a document.

A graph has a band for each of its orders, all of one graph to one scale: what is computed and what is waited for, and
below that what each link carries. Names and times of what is drawn show under the pointer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from moecompile.overlap_text import Order, cells_of, orders
from moecompile.passes.list_schedule import Span, Task, links_of

if TYPE_CHECKING:
    from moecompile.report import GraphReport

WIDTH, MARGIN, LABELS = 1200, 16, 110
HEIGHT, GAP, LINE = 22, 4, 18
"""Of a track, between tracks, and of a line of text, in pixels."""
COLOURS = {"computes": "#3b6ea5", "waits": "#d9d9d9", "carries": "#d9822b"}
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.head{font-weight:600}.small{fill:#666}"
    "@media(prefers-color-scheme:dark){svg{background:#1b1b1b}text{fill:#eee}.small{fill:#aaa}}"
)


def render(graphs: Sequence[GraphReport]) -> str:
    """The picture's text."""
    drawn, top = list[str](), MARGIN
    for graph in graphs:
        for kind, plan in graph.planned.items():
            found = orders(plan)
            longest = max(order.timeline.makespan for order in found) or 1.0
            drawn.append(_text(MARGIN, top + 13, f"graph {graph.index} {graph.name}, {kind}", "head"))
            top += LINE + GAP
            for order in found:
                tracks = _tracks(order, plan.tasks)
                drawn += _band(top, order, tracks, (WIDTH - 2 * MARGIN - LABELS) / longest)
                top += LINE + len(tracks) * (HEIGHT + GAP) + 2 * GAP
            top += 2 * MARGIN
    body = "\n".join(drawn)
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{body}\n{_legend(top)}\n</svg>\n'


Track = tuple[str, list[tuple[str, str, Span]]]
"""Its label, and what is on it: what it does, its name, and when."""


def _tracks(order: Order, tasks: Sequence[Task]) -> list[Track]:
    timeline = order.timeline
    device = [("waits", tasks[number].name, span) for number, span in timeline.waits.items()]
    device += [("computes", task.name, span) for task, span in zip(tasks, timeline.computed, strict=True)]
    found: list[Track] = [("computes", device)]
    for link in links_of(tasks):
        sent = zip(tasks, timeline.sent, strict=True)
        carried = [
            ("carries", task.name, span) for task, span in sent
            if task.sends is not None and task.sends.link == link and span is not None
        ]  # fmt: skip
        found.append((link, carried))
    return found


def _band(top: int, order: Order, tracks: Sequence[Track], scale: float) -> Iterator[str]:
    """An order: its times in words, and its tracks."""
    total, computes, waits, hidden, held = cells_of(order.timeline)
    words = f"{order.words}: {total} us, computes {computes}, waits {waits}, hidden {hidden or '-'}, holds {held} MiB"
    yield _text(MARGIN, top + 13, words, "small")
    for number, (label, spans) in enumerate(tracks):
        y = top + LINE + number * (HEIGHT + GAP)
        yield _text(MARGIN, y + 15, label)
        for what, name, span in spans:
            if span.end > span.begin:
                yield _bar(MARGIN + LABELS + scale * span.begin, y, scale * (span.end - span.begin), what, name, span)


def _bar(x: float, y: float, width: float, what: str, name: str, span: Span) -> str:
    title = escape(f"{what} {name}: {1e6 * (span.end - span.begin):.1f} us from {1e6 * span.begin:.1f}")
    place = f'x="{x:.2f}" y="{y}" width="{max(width, 0.4):.2f}" height="{HEIGHT}" fill="{COLOURS[what]}"'
    return f'<rect {place} stroke="#fff" stroke-width="0.3"><title>{title}</title></rect>'


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'


def _legend(bottom: int) -> str:
    found = []
    for number, (what, colour) in enumerate(COLOURS.items()):
        x = WIDTH - MARGIN - 90 * (len(COLOURS) - number)
        found.append(f'<rect x="{x}" y="{bottom - 26}" width="14" height="14" fill="{colour}"/>')
        found.append(_text(x + 20, bottom - 14, what, "small"))
    return "\n".join(found)
