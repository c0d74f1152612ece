"""What is predicted, or was measured, of ordered graphs (`overlap`), for a terminal: a table, and orders in time.

forward, now         computes  ######.####.###    # computes, . waits for other ranks
nvlink      ====  ====       = carries
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moecompile.passes.list_schedule import Span, Timeline, links_of
from moecompile.text_table import table

if TYPE_CHECKING:
    from moecompile.passes.overlap import Plan

COLUMNS = ("us", "computes", "waits", "hidden", "holds")
LEGEND = "hidden: of the time on links, behind what is computed; holds: results at once, in MiB, without inputs"
PREDICTED, MEASURED = "predicted", "measured"
LABEL = 24
"""Columns of what a line is of, at least."""
NOW, BEFORE = "now", "as it came"


@dataclass(frozen=True)
class Order:
    """One of a graph's.

    Attributes:
        basis: whether what its operators take was "measured", or is "predicted".
        place: the order that it has "now", or "as it came".
        timeline: what it comes to.
    """

    basis: str
    place: str
    timeline: Timeline

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.basis}, {self.place}"


def orders(plan: Plan) -> list[Order]:
    """The order that a graph has, and the one that it came in, if that is another.

    Of the first there is what is predicted, too, where operators were measured.
    """
    basis, now = (MEASURED if plan.unmeasured else PREDICTED), plan.after if plan.moves else plan.before
    found = [Order(basis, NOW, now)]
    if plan.predicted is not None:
        found.append(Order(PREDICTED, NOW, plan.predicted))
    return [*found, Order(basis, BEFORE, plan.before)] if plan.moves else found


def render(planned: Mapping[str, Plan], width: int) -> list[str]:
    """Lines for the graphs of one captured graph, by "forward", "backward" and "pair" with its number."""
    if not planned:
        return []
    found = {kind: orders(plan) for kind, plan in planned.items()}
    bases = {order.basis for each in found.values() for order in each}
    title = f"overlap, {bases.pop()}" if len(bases) == 1 else "overlap"

    def named(kind: str, order: Order) -> str:
        return f"{kind}, {order.place}" if title != "overlap" else f"{kind}, {order.words}"

    rows = [((named(kind, order), *cells_of(order.timeline)), "") for kind, each in found.items() for order in each]
    lines = [*table((title, *COLUMNS), rows, width), f"  {LEGEND}"]
    labels = max(LABEL, *(len(named(kind, order)) for kind, each in found.items() for order in each))
    for kind, each in found.items():
        longest = max(order.timeline.makespan for order in each)
        for order in each:
            lines += _in_time(named(kind, order), planned[kind], order.timeline, longest, width, labels)
    return lines


def cells_of(timeline: Timeline) -> tuple[str, ...]:
    """Of a row, by `COLUMNS`."""
    sent = sum(span.end - span.begin for span in timeline.sent if span is not None)
    hidden = f"{max(0.0, 1 - timeline.exposed / sent):.0%}" if sent else ""
    times = (f"{1e6 * seconds:.0f}" for seconds in (timeline.makespan, timeline.busy, timeline.exposed))
    return *times, hidden, f"{timeline.peak / 2**20:.1f}"


def _in_time(title: str, plan: Plan, timeline: Timeline, longest: float, width: int, labels: int) -> list[str]:
    """A line for the device and one for each link, all orders of a graph to one scale."""
    links = links_of(plan.tasks)
    wide = max(map(len, ("computes", *links)))
    room = width - 2 - labels - 2 - wide - 2
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
    return [f"  {first:<{labels}}  {track:<{wide}}  {cells}".rstrip() for first, track, cells in named]
