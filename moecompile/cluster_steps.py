"""A training step of a pipeline whose stages are layers on a cluster: predicted times, in the pipeline's simulation."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from moecompile.cluster import Run
from moecompile.pipeline_schedules import SCHEDULES, SizeError
from moecompile.pipeline_simulation import Durations, simulate

IN_PARTS = ("ZB1P", "DualPipe", "DualPipeV")
"""Schedules that run the two parts of a backward apart."""


@dataclass(frozen=True)
class StepTime:
    """A training step under one schedule, without reduction of gradients and optimizer.

    Attributes:
        schedule: its name.
        gpus: of the whole pipeline: each of its ranks is a cluster.
        seconds: of the step.
        bubble: share of it for which the rank that waits the longest runs nothing.
        tokens: that a GPU trains on in a second.
    """

    schedule: str
    gpus: int
    seconds: float
    bubble: float
    tokens: float


def steps(run: Run, stages: int, microbatches: int) -> dict[str, StepTime | str]:
    """For each schedule, by name, a step, or why there is none.

    A whole backward takes its two parts one after the other where a schedule runs these apart elsewhere.
    """
    inputs, weights, sent = run.inputs().total, run.weights(), transfer(run)
    forward, pair, at_once = run.forward().total, run.pair().total, run.backward().total
    found: dict[str, StepTime | str] = {}
    for name, make in SCHEDULES.items():
        try:
            schedule = make(stages, microbatches)
        except SizeError as error:
            found[name] = str(error)
            continue
        backward = inputs + weights if name in IN_PARTS else at_once
        times = forward, backward, weights, pair, sent
        timeline = simulate(schedule, Durations(*map(_exact, times)))
        seconds, gpus = float(timeline.makespan), len(timeline.ranks) * run.cluster.ranks
        trained = microbatches * run.batch.tokens * run.cluster.ranks / seconds / gpus
        found[name] = StepTime(name, gpus, seconds, float(max(timeline.bubbles) / timeline.makespan), trained)
    return found


def transfer(run: Run) -> float:
    """Seconds in which a micro-batch of a rank goes on to the next stage, on another host, in bfloat16."""
    network = run.cluster.hardware.links["network"]
    return 2 * run.batch.tokens * run.model.hidden / network.rate + network.latency


def _exact(seconds: float) -> Fraction:
    """In whole nanoseconds, which add exactly."""
    return Fraction(round(seconds * 10**9), 10**9)
