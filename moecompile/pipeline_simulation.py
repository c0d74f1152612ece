"""How long a pipeline schedule takes, how long its ranks wait, and what they hold.

Contract
- A rank runs its steps in order, one at a time, each as soon as what it needs is there.
- The forward of a micro-batch on a stage needs its forward on the stage before; the backward, or its input part, needs
  that of the stage after, on the last stage its forward; the weight part needs its input part.
- A schedule that does not compute everything once, and one that gets stuck, are errors: no number comes of them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from moecompile.pipeline_schedules import Action, Kind, Overlapped, Schedule, Step


@dataclass(frozen=True)
class Durations:
    """Times, in any unit, of the actions of one micro-batch on one stage. All stages are alike.

    Attributes:
        forward: F.
        backward: B, the whole backward: input part and weight part.
        weight: W, its weight part.
        overlapped: F&B, a forward and a backward that run as one.
        transfer: until what one rank computed is there for another. Transfers wait for nobody, and nobody for them but
            who needs them.
    """

    forward: Fraction
    backward: Fraction
    weight: Fraction
    overlapped: Fraction
    transfer: Fraction = Fraction(0)

    def of(self, step: Step) -> Fraction:
        """How long a step takes."""
        if isinstance(step, Overlapped):
            return self.overlapped
        return {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.INPUT: self.backward - self.weight,
            Kind.WEIGHT: self.weight,
        }[step.kind]


@dataclass(frozen=True)
class Event:
    """A step in time."""

    step: Step
    begin: Fraction
    end: Fraction


@dataclass(frozen=True)
class Timeline:
    """A schedule in time.

    Attributes:
        schedule: what ran.
        durations: of its actions.
        ranks: the events of each rank, in order.
    """

    schedule: Schedule
    durations: Durations
    ranks: Sequence[Sequence[Event]]

    @property
    def makespan(self) -> Fraction:
        """From the first beginning to the last end."""
        return max(events[-1].end for events in self.ranks if events)

    @property
    def bubbles(self) -> list[Fraction]:
        """For each rank, the time within the makespan in which it runs nothing."""
        makespan = self.makespan
        return [makespan - sum(event.end - event.begin for event in events) for events in self.ranks]

    @property
    def peak_activations(self) -> list[int]:
        """For each rank, how many activations it holds at most: of one micro-batch on one stage each.

        They are held from the beginning of the forward to the end of the backward, of its weight part where it has two.
        """
        return [_peak(events) for events in self.ranks]


class ScheduleError(ValueError):
    """A schedule that cannot run."""


def simulate(schedule: Schedule, durations: Durations) -> Timeline:
    """Runs a schedule; raises ScheduleError where something is missing, there twice, or waits for itself."""
    rank_of = _ranks_of_results(schedule)
    ready: dict[Action, Fraction] = {}
    ranks: list[list[Event]] = [[] for _ in schedule.ranks]

    def begin(rank: int, step: Step) -> Fraction | None:
        """When it may begin; None as long as that is not known."""
        times = [ranks[rank][-1].end if ranks[rank] else Fraction(0)]
        for need in _needs(step, schedule.stages):
            if need not in ready:
                return None
            times.append(ready[need] + (durations.transfer if rank_of[need] != rank else 0))
        return max(times)

    moved = True
    while moved:
        moved = False
        for rank, (events, steps) in enumerate(zip(ranks, schedule.ranks, strict=True)):
            while len(events) < len(steps) and (start := begin(rank, steps[len(events)])) is not None:
                event = Event(steps[len(events)], start, start + durations.of(steps[len(events)]))
                events.append(event)
                ready.update(dict.fromkeys(_results(event.step), event.end))
                moved = True
    if any(len(events) < len(steps) for events, steps in zip(ranks, schedule.ranks, strict=True)):
        raise ScheduleError(_who_waits(schedule, [len(events) for events in ranks], rank_of, ready))
    return Timeline(schedule, durations, ranks)


def _who_waits(schedule: Schedule, done: Sequence[int], rank_of: Mapping[Action, int], ready: Container[Action]) -> str:
    """What each rank that is not through waits for, where nobody can go on."""
    lines = [f"{schedule.name} gets stuck: every rank that is not through waits for another"]
    for rank, (count, steps) in enumerate(zip(done, schedule.ranks, strict=True)):
        if count < len(steps):
            needs = [need for need in _needs(steps[count], schedule.stages) if need not in ready]
            lacking = " and ".join(f"{need}, by rank {rank_of[need]}" for need in needs)
            lines.append(f"  rank {rank}: {steps[count]} waits for {lacking}")
    return "\n".join(lines)


def _needs(step: Step, stages: int) -> Iterator[Action]:
    """Results that have to be there before a step begins."""
    for action in step.parts:
        if action.kind is Kind.WEIGHT:
            yield Action(Kind.INPUT, action.stage, action.microbatch)
        elif action.kind is Kind.FORWARD:
            if action.stage > 0:
                yield Action(Kind.FORWARD, action.stage - 1, action.microbatch)
        elif action.stage < stages - 1:
            yield Action(Kind.INPUT, action.stage + 1, action.microbatch)
        else:
            yield Action(Kind.FORWARD, action.stage, action.microbatch)


def _results(step: Step) -> Iterator[Action]:
    """What is there after it; of a whole backward both parts."""
    for action in step.parts:
        if action.kind is Kind.BACKWARD:
            yield Action(Kind.INPUT, action.stage, action.microbatch)
            yield Action(Kind.WEIGHT, action.stage, action.microbatch)
        else:
            yield action


def _ranks_of_results(schedule: Schedule) -> dict[Action, int]:
    """The rank that computes each result; raises ScheduleError where not each is computed once."""
    found: dict[Action, int] = {}
    for rank, steps in enumerate(schedule.ranks):
        for step in steps:
            for result in _results(step):
                if result in found:
                    raise ScheduleError(f"{schedule.name} has {result} twice: on ranks {found[result]} and {rank}")
                found[result] = rank
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            for kind in (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT):
                if Action(kind, stage, microbatch) not in found:
                    raise ScheduleError(f"{schedule.name} lacks {Action(kind, stage, microbatch)}")
    return found


def _peak(events: Sequence[Event]) -> int:
    held = peak = 0
    for event in events:
        kinds = [action.kind for action in event.step.parts]
        held += kinds.count(Kind.FORWARD)
        peak = max(peak, held)
        held -= kinds.count(Kind.BACKWARD) + kinds.count(Kind.WEIGHT)
    return peak
