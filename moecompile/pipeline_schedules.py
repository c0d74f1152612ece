"""Pipeline schedules as lists of actions: what each rank runs, and in which order. Nothing here knows of time.

`SCHEDULES` is the table: 1F1B, ZB1P, DualPipe, DualPipeV. A schedule is made for a number of stages and of
micro-batches; each micro-batch goes forward through all stages and backward through all of them, once.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Kind(enum.Enum):
    """What an action computes, and the letter it is written with."""

    FORWARD = "F"
    BACKWARD = "B"
    """All of the backward: gradients of inputs and of weights."""
    INPUT = "I"
    """Its part that other stages wait for, gradients of inputs."""
    WEIGHT = "W"
    """Its part that nobody waits for, gradients of weights."""


_WORDS = {
    Kind.FORWARD: "the forward",
    Kind.BACKWARD: "the backward",
    Kind.INPUT: "the backward's input part",
    Kind.WEIGHT: "the backward's weight part",
}


@dataclass(frozen=True)
class Action:
    """One computation of one micro-batch on one stage.

    Attributes:
        kind: what is computed.
        stage: number of the stage, from 0, where micro-batches enter.
        microbatch: number of the micro-batch, from 0.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{_WORDS[self.kind]} of micro-batch {self.microbatch} on stage {self.stage}"

    @property
    def parts(self) -> tuple[Action, ...]:
        """What it consists of: itself."""
        return (self,)


@dataclass(frozen=True)
class Overlapped:
    """A forward and a backward, of different micro-batches, that run as one action: F&B in the formulas.

    It begins when both may begin, and the results of both are there at its end.
    """

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward} together with {self.backward}"

    @property
    def parts(self) -> tuple[Action, ...]:
        """The two."""
        return (self.forward, self.backward)


Step = Action | Overlapped


@dataclass(frozen=True)
class Schedule:
    """What each rank of a pipeline runs.

    Attributes:
        name: as in `SCHEDULES`.
        stages: of the model.
        microbatches: of a training step.
        ranks: the steps of each rank, in order. Which stages a rank holds follows from them.
    """

    name: str
    stages: int
    microbatches: int
    ranks: Sequence[Sequence[Step]]


class SizeError(ValueError):
    """A schedule does not exist for such numbers of stages and micro-batches."""


def one_forward_one_backward(stages: int, microbatches: int) -> Schedule:
    """1F1B: after the warm-up a backward and a forward in turn. Source: PipeDream-Flush, arXiv:2006.09503."""
    ranks: list[list[Step]] = []
    for stage in range(stages):
        warm_up = min(stages - stage, microbatches)
        steps: list[Step] = [Action(Kind.FORWARD, stage, number) for number in range(warm_up)]
        for number in range(microbatches):
            steps.append(Action(Kind.BACKWARD, stage, number))
            if warm_up + number < microbatches:
                steps.append(Action(Kind.FORWARD, stage, warm_up + number))
        ranks.append(steps)
    return Schedule("1F1B", stages, microbatches, ranks)


def zero_bubble(stages: int, microbatches: int) -> Schedule:
    """ZB1P, which its authors call ZB-H1: 1F1B with weight parts put off to where a rank would wait.

    Stage s is s weight parts behind its input parts. So it holds as many micro-batches as 1F1B's first stage at most,
    and has s weight parts left for the end, while the stages before it finish.

    Source: "Zero Bubble Pipeline Parallelism", arXiv:2401.10241, section 2.1.
    """
    ranks: list[list[Step]] = []
    for stage in range(stages):
        warm_up = min(stages - stage, microbatches)
        steps: list[Step] = [Action(Kind.FORWARD, stage, number) for number in range(warm_up)]
        weights = deque(Action(Kind.WEIGHT, stage, number) for number in range(microbatches))
        for number in range(microbatches):
            steps.append(Action(Kind.INPUT, stage, number))
            steady = warm_up + number < microbatches
            if number >= stage or not steady:
                steps.append(weights.popleft())
            if steady:
                steps.append(Action(Kind.FORWARD, stage, warm_up + number))
        ranks.append([*steps, *weights])
    return Schedule("ZB1P", stages, microbatches, ranks)


def dualpipe(stages: int, microbatches: int) -> Schedule:
    """DualPipe: half of the micro-batches enter at the first rank, the other half at the last.

    Every rank holds two stages, one for each direction: rank r stages r and `stages - 1 - r`. Micro-batches of the
    second half, from `microbatches / 2`, enter at the last rank.

    Source: DeepSeek-V3, arXiv:2412.19437, section 3.2.1 and figure 5; the eight steps as its authors published them.
    """
    if stages % 2:
        raise SizeError(f"expected an even number of stages, got {stages}: its two directions meet in the middle")
    if microbatches % 2:
        raise SizeError(f"expected an even number of micro-batches, got {microbatches}: half come from either end")
    if microbatches < 2 * stages:
        raise SizeError(f"expected at least {2 * stages} micro-batches, two for each stage, got {microbatches}")
    half = microbatches // 2
    ranks = []
    for rank in range(stages):
        from_end = min(rank, stages - 1 - rank)
        near, far = (0, half) if rank == from_end else (half, 0)
        ranks.append(_eight_steps(from_end, stages, half, _Phases(near, far)))
    return Schedule("DualPipe", stages, microbatches, ranks)


def dualpipe_v(stages: int, microbatches: int) -> Schedule:
    """DualPipeV: DualPipe's first half of ranks alone, for all micro-batches; no stage is held twice.

    Rank r of `stages / 2` holds stages r and `stages - 1 - r`: micro-batches go down the ranks and come back up.

    Source: "DualPipe could be better without the Dual", https://huggingface.co/blog/ufotalent/cut-in-half
    """
    if stages % 2:
        raise SizeError(f"expected an even number of stages, got {stages}: every rank holds two")
    if microbatches < stages:
        raise SizeError(f"expected at least {stages} micro-batches, one for each stage, got {microbatches}")
    ranks = [_eight_steps(rank, stages, microbatches, _Phases(0, 0)) for rank in range(stages // 2)]
    return Schedule("DualPipeV", stages, microbatches, ranks)


class _Phases(NamedTuple):
    """The first micro-batch of either phase of a rank.

    Phase 0 are the micro-batches on their way from this rank's end of the pipeline, phase 1 those that come from the
    other end, or back.
    """

    near: int
    far: int


def _eight_steps(from_end: int, stages: int, microbatches: int, first: _Phases) -> list[Step]:
    """The steps of one rank; names as in the publication: 0 and 1 are phases, n is how often.

    Args:
        from_end: how far the rank is from its end of the pipeline; 0 is the end itself.
        stages: of the model.
        microbatches: of either phase.
        first: the first micro-batch of either phase.
    """
    rank = _Rank((from_end, stages - 1 - from_end), first)
    to_middle = stages // 2 - 1 - from_end

    # Step 1: nF0
    for _ in range(2 * to_middle):
        rank.forward(0)
    # Step 2: nF0F1
    for _ in range(from_end + 1):
        rank.forward(0)
        rank.forward(1)
    # Step 3: nI1W1F1
    for _ in range(to_middle):
        rank.input(1)
        rank.weight()
        rank.forward(1)
    # Step 4, the main step: n(F0&B1)(F1&B0)
    for turn in range(microbatches - stages + from_end + 1):
        if turn == 0 and to_middle == 0:
            # The rank's first backward is still on its way from the other end: in a pair the forward would wait for it.
            rank.forward(0)
            rank.backward(1)
        else:
            rank.overlapped(0, 1)
        rank.overlapped(1, 0)
    # Step 5: nB1(F1&B0)
    for _ in range(to_middle):
        rank.backward(1)
        rank.overlapped(1, 0)
    # Step 6: nB1B0, of which the second half leaves weight parts for later
    for number in range(2 * (from_end + 1)):
        phase = 1 - number % 2
        if number <= from_end:
            rank.backward(phase)
        else:
            rank.input(phase)
    # Step 7: nW I0
    for _ in range(to_middle):
        rank.weight()
        rank.input(0)
    # Step 8: nW
    for _ in range(from_end + 1):
        rank.weight()
    return rank.steps


@dataclass
class _Rank:
    """Writes down what a rank of DualPipe runs. Of each phase micro-batches come in order, so it counts them.

    Attributes:
        stages: of either phase.
        first: micro-batch of either phase.
        steps: so far.
        forwards: how many micro-batches of either phase went forward.
        backwards: and backward.
        weights: parts that were put off.
    """

    stages: tuple[int, int]
    first: _Phases
    steps: list[Step] = field(default_factory=list)
    forwards: list[int] = field(default_factory=lambda: [0, 0])
    backwards: list[int] = field(default_factory=lambda: [0, 0])
    weights: deque[Action] = field(default_factory=deque)

    def forward(self, phase: int) -> None:
        self.steps.append(self._next(Kind.FORWARD, phase))

    def backward(self, phase: int) -> None:
        self.steps.append(self._next(Kind.BACKWARD, phase))

    def overlapped(self, forward: int, backward: int) -> None:
        self.steps.append(Overlapped(self._next(Kind.FORWARD, forward), self._next(Kind.BACKWARD, backward)))

    def input(self, phase: int) -> None:
        """The backward without its weight part, which is put off."""
        action = self._next(Kind.INPUT, phase)
        self.steps.append(action)
        self.weights.append(Action(Kind.WEIGHT, action.stage, action.microbatch))

    def weight(self) -> None:
        """The oldest weight part that was put off."""
        self.steps.append(self.weights.popleft())

    def _next(self, kind: Kind, phase: int) -> Action:
        counts = self.forwards if kind is Kind.FORWARD else self.backwards
        counts[phase] += 1
        return Action(kind, self.stages[phase], self.first[phase] + counts[phase] - 1)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "1F1B": one_forward_one_backward,
    "ZB1P": zero_bubble,
    "DualPipe": dualpipe,
    "DualPipeV": dualpipe_v,
}
"""By name: from numbers of stages and of micro-batches; SizeError where the schedule does not exist for them."""
