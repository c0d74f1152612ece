"""What is predicted, or was measured, of ordered graphs (`overlap`), as a trace for ui.perfetto.dev or Chrome.

A graph has a process for each of its orders, as it came and as it is run, which begin together, and one more of what is
predicted where its operators were measured; in these a track for
what is computed, one for what the device waits for, and one for each link. An arrow leads from what begins
communication to what awaits it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moecompile.overlap_text import orders
from moecompile.passes.list_schedule import Span, Task, Timeline, links_of

if TYPE_CHECKING:
    from moecompile.report import GraphReport

COMPUTED, WAITED = "computation", "waiting for other ranks"
Events = list[dict[str, Any]]


def trace_of(graphs: Sequence[GraphReport]) -> dict[str, Any]:
    """The trace's JSON, as plain dicts, lists, strings and numbers; times are microseconds."""
    events, numbers = Events(), itertools.count()
    for graph in graphs:
        for kind, plan in graph.planned.items():
            for order in orders(plan):
                name = f"graph {graph.index} {graph.name}, {kind}, {order.words}"
                events += _process(next(numbers), name, plan.tasks, order.timeline)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _process(number: int, name: str, tasks: Sequence[Task], timeline: Timeline) -> Iterator[dict[str, Any]]:
    tracks = {track: place for place, track in enumerate((COMPUTED, WAITED, *links_of(tasks)))}
    yield {"ph": "M", "pid": number, "name": "process_name", "args": {"name": name}}
    for track, place in tracks.items():
        yield {"ph": "M", "pid": number, "tid": place, "name": "thread_name", "args": {"name": track}}
    waits = timeline.waits
    for each in timeline.order:
        task, computed, sent = tasks[each], timeline.computed[each], timeline.sent[each]
        if each in waits:
            yield _event(number, tracks[WAITED], task.name, waits[each])
        if computed.end > computed.begin:
            yield _event(number, tracks[COMPUTED], task.name, computed)
        if task.sends is not None and sent is not None:
            yield _event(number, tracks[task.sends.link], task.name, sent)
        yield from _arrows(number, tracks, tasks, timeline, each)


def _event(process: int, track: int, name: str, span: Span) -> dict[str, Any]:
    times = {"ts": 1e6 * span.begin, "dur": 1e6 * (span.end - span.begin)}
    return {"ph": "X", "pid": process, "tid": track, "name": name, **times}


def _arrows(
    process: int, tracks: Mapping[str, int], tasks: Sequence[Task], timeline: Timeline, number: int
) -> Iterator[dict[str, Any]]:
    """From what was sent to the task that received it."""
    for sender in tasks[number].receives:
        sends, sent = tasks[sender].sends, timeline.sent[sender]
        if sends is None or sent is None:
            continue
        about = {"pid": process, "cat": "arrival", "name": tasks[sender].name, "id": f"{process} {sender} {number}"}
        yield {"ph": "s", "tid": tracks[sends.link], "ts": 1e6 * sent.end, **about}
        received = timeline.computed[number].begin
        yield {"ph": "f", "bp": "e", "tid": tracks[COMPUTED], "ts": 1e6 * received, **about}
