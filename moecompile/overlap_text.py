"""What is predicted of ordered graphs (`overlap`), for a terminal: a table, and orders in time.

forward, now         computes  ######.####.###    # computes, . waits for other ranks
nvlink      ====  ====       = carries
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from moecompile.passes.list_schedule import Span, Timeline, links_of
from moecompile.text_table import table

if TYPE_CHECKING:
    from moecompile.passes.overlap import Plan

COLUMNS = ("overlap, predicted", "us", "computes", "waits", "hidden", "holds")
LEGEND = "hidden: of the time on links, behind what is computed; holds: results at once, in MiB, without inputs"
NOW, BEFORE = "now", "as it came"


def orders(plan: Plan) -> Mapping[str, Timeline]:
    """The order that a graph has, and the one that it came in, if that is another."""
    return {NOW: plan.after, BEFORE: plan.before} if plan.moves else {NOW: plan.before}


def render(planned: Mapping[str, Plan], width: int) -> list[str]:
    """Lines for the graphs of one captured graph, by "forward" and "backward"."""
    if not planned:
        return []
    rows = [
        ((f"{kind}, {words}", *_cells(timeline)), "")
        for kind, plan in planned.items()
        for words, timeline in orders(plan).items()
    ]
    lines = [*table(COLUMNS, rows, width), f"  {LEGEND}"]
    for kind, plan in planned.items():
        longest = max(timeline.makespan for timeline in orders(plan).values())
        for words, timeline in orders(plan).items():
            lines += _in_time(f"{kind}, {words}", plan, timeline, longest, width)
    return lines


def _cells(timeline: Timeline) -> tuple[str, ...]:
    sent = sum(span.end - span.begin for span in timeline.sent if span is not None)
    hidden = f"{max(0.0, 1 - timeline.exposed / sent):.0%}" if sent else ""
    times = (f"{1e6 * seconds:.0f}" for seconds in (timeline.makespan, timeline.busy, timeline.exposed))
    return *times, hidden, f"{timeline.peak / 2**20:.1f}"


def _in_time(title: str, plan: Plan, timeline: Timeline, longest: float, width: int) -> list[str]:
    """A line for the device and one for each link, all orders of a graph to one scale."""
    links = links_of(plan.tasks)
    wide = max(map(len, ("computes", *links)))
    room = width - 2 - 24 - 2 - wide - 2
    scale = room / longest if longest else 0.0

    def line(*given: tuple[str, Iterable[Span]]) -> str:
        cells = [" "] * room
        for mark, spans in given:
            for span in spans:
                begin, end = round(scale * span.begin), round(scale * span.end)
                cells[begin:end] = mark * (min(end, room) - begin)
        return "".join(cells).rstrip()

    computed = [span for span in timeline.computed if span.end > span.begin]
    named = [(title, "computes", line((".", timeline.waits.values()), ("#", computed)))]
    for link in links:
        carried = [
            span
            for task, span in zip(plan.tasks, timeline.sent, strict=True)
            if span is not None and task.sends is not None and task.sends.link == link
        ]
        named.append(("", link, line(("=", carried))))
    return [f"  {first:<24}  {track:<{wide}}  {cells}".rstrip() for first, track, cells in named]
