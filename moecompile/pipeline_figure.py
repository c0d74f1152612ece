"""A pipeline schedule as a picture in text: a line for each rank, time from left to right, a cell for each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from moecompile.pipeline_schedules import Overlapped, Step
from moecompile.pipeline_simulation import Event, Timeline

LEGEND = (
    "F forward, B backward, I its input part, W its weight part, and the micro-batch; f, b, i, w on the later of a "
    "rank's two stages; & between a forward and a backward that run as one; blank: the bubble; what begins with - goes "
    "on from above."
)
TICK = 5
"""Forwards from one time on the axis to the next."""


def figure(timeline: Timeline, width: int) -> str:
    """The picture, in parts below each other where it is wider than `width`; `LEGEND` says how to read it."""
    scale = _Scale(timeline)
    name_width = len(f"rank {len(timeline.ranks) - 1}  ")
    room = max((width - name_width) // scale.forward, 1) * scale.forward
    parts = math.ceil(scale.columns(timeline.makespan) / room)
    # parts of one width, whole forwards each
    size = math.ceil(scale.columns(timeline.makespan) / parts / scale.forward) * scale.forward
    lines: list[str] = []
    for first in range(0, scale.columns(timeline.makespan), size):
        lines += [""] * bool(lines)
        lines.append(f"{'time':<{name_width}}{scale.axis(first, first + size)}")
        for rank, events in enumerate(timeline.ranks):
            lines.append(f"{f'rank {rank}':<{name_width}}{scale.row(events, first, first + size)}".rstrip())
    return "\n".join(lines)


def columns(timeline: Timeline) -> int:
    """How wide the picture is in one part, in characters."""
    return _Scale(timeline).columns(timeline.makespan)


class _Scale:
    """How time becomes columns: a forward has room for its letter, its micro-batch and a space."""

    def __init__(self, timeline: Timeline) -> None:
        self.time_of_forward = timeline.durations.forward
        self.forward = len(f"F{timeline.schedule.microbatches - 1} ")

    def columns(self, time: Fraction) -> int:
        return round(time / self.time_of_forward * self.forward)

    def axis(self, first: int, last: int) -> str:
        line = ""
        for tick in range(math.ceil(first / self.forward / TICK), math.ceil(last / self.forward / TICK)):
            at = tick * TICK * self.forward - first
            line = f"{line:<{at}}{number_text(tick * TICK * self.time_of_forward)}"
        return line

    def row(self, events: Sequence[Event], first: int, last: int) -> str:
        """A rank's cells between two columns."""
        stages = {action.stage for event in events for action in event.step.parts}
        line = ""
        for event in events:
            begin, end = self.columns(event.begin), self.columns(event.end)
            if begin < last and end > first:
                left, right = max(begin, first) - first, min(end, last) - first
                line = f"{line:<{left}}{_cell(event.step, min(stages), right - left, cut=begin < first)}"
        return line


def _cell(step: Step, early_stage: int, size: int, cut: bool) -> str:
    """A cell, with as much of its label as fits; one of a single column has no space at its end."""
    letters = [action.kind.value if action.stage == early_stage else action.kind.value.lower() for action in step.parts]
    labels = ["&".join(f"{letter}{action.microbatch}" for letter, action in zip(letters, step.parts, strict=True))]
    labels += ["&".join(letters), "&" if isinstance(step, Overlapped) else letters[0]]
    marked = [f"{'-' * cut}{label}" for label in labels]
    label = next((label for label in marked if len(label) < size), "-" if cut else labels[-1])
    return label.ljust(size - 1, "-").ljust(size)[:size]


def number_text(value: Fraction) -> str:
    """A time as it is printed."""
    return f"{float(value):.10g}"
