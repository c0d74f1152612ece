"""How `python -m moecompile bench` times: contenders take turns, each call alone on cold caches, on the device's clock.

    for each round:  for each contender:  overwrite the L2 cache, let the host get ahead, time one call
    median of the rounds

The host issues a call while the device still waits, so that what is timed is the device's work and not the host's; how
long the host took is noted beside it. Of single kernels a few are timed together, `burst`: between two events lie
microseconds that belong to no kernel. Where launches are the cost, `back_to_back` times a row of calls as they come.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

Call = Callable[[], object]

FLUSHED_BYTES = 256 * 2**20
"""Written before each call that is timed alone; the largest L2 cache of a Hopper GPU holds 60 MB."""
CYCLES = 2_000_000
"""Of a Hopper GPU's clock, at most, in a millisecond."""
ATTEMPTS = 4
LONGEST_LEAD = 60.0


@dataclass(frozen=True)
class Timing:
    """One call: milliseconds on the device, and those the host took to issue it, and whether it was ahead all along."""

    device: float
    host: float
    ahead: bool = True


@dataclass(frozen=True)
class Statistics:
    """Several timings of one thing, in milliseconds.

    Attributes:
        median: what is reported.
        quartiles: of the timings; how far apart they are is how noisy the run was.
        host: the median of the host's share.
        count: how many there were.
        ahead: whether the device never waited for the host; if it did, its time is part of what was measured.
    """

    median: float
    quartiles: tuple[float, float]
    host: float
    count: int
    ahead: bool = True

    @classmethod
    def of(cls, timings: Sequence[Timing]) -> Statistics:
        """Those of at least one timing."""
        times = [timing.device for timing in timings]
        low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        host = statistics.median(timing.host for timing in timings)
        return cls(statistics.median(times), (low, high), host, len(times), all(timing.ahead for timing in timings))

    @property
    def spread(self) -> float:
        """The distance of the quartiles as a part of the median."""
        return (self.quartiles[1] - self.quartiles[0]) / self.median


@dataclass(frozen=True)
class Contender:
    """One of those that are compared.

    Attributes:
        name: in print and in JSON.
        call: does the work once, on the input set of that number (it wraps around).
        flops: floating-point operations of one call.
        precision: what it multiplies, "bf16" or "fp8": whose ceiling is its floor.
        kernels: moecompile's that a call launches at least, if it is ours (`moecompile.bench_proof`).
    """

    name: str
    call: Callable[[int], object]
    flops: float
    precision: str = "bf16"
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Absent:
    """A contender that cannot run here, and why."""

    name: str
    reason: str


class Timer(Protocol):
    """A device's clock."""

    def burst(self, name: str, calls: Sequence[Call]) -> Timing:
        """Times calls that follow each other on cold caches, none waiting for the host; returns a call's share.

        Bursts of one name take similar time on the host.
        """
        ...

    def back_to_back(self, calls: Sequence[Call]) -> Timing:
        """Times calls that follow each other as fast as the host issues them; returns a call's share."""
        ...

    def recorded(self, calls: Sequence[Call]) -> Call:
        """One call that does all of these with the least help of the host."""
        ...

    def synchronize(self) -> None:
        """Waits until the device is idle."""
        ...


def _issued(calls: Sequence[Call], start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Issues the calls between two events; milliseconds of the host."""
    start.record()
    begun = time.perf_counter()
    for call in calls:
        call()
    host = 1000 * (time.perf_counter() - begun)
    end.record()
    return host


@dataclass
class CudaTimer:
    """The current CUDA device's clock.

    Attributes:
        lead: for how many milliseconds the device is kept waiting while the host issues a call, by name.
    """

    lead: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._flushed = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")

    def burst(self, name: str, calls: Sequence[Call]) -> Timing:
        """Flushes the L2 cache, keeps the device waiting, issues the calls; tries again if the host fell behind."""
        for _ in range(ATTEMPTS):
            timing = self.attempt(name, calls)
            if timing.ahead:
                break
            self.give_lead(name, timing.host * len(calls))
        return timing

    def attempt(self, name: str, calls: Sequence[Call], before: Call | None = None) -> Timing:
        """Does so once; `before` is issued behind the wait and in front of what is timed."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        torch.cuda._sleep(int(self.lead.get(name, 1.0) * CYCLES))
        if before is not None:
            before()
        host = _issued(calls, start, end)
        ahead = not start.query()
        end.synchronize()
        return Timing(start.elapsed_time(end) / len(calls), host / len(calls), ahead)

    def give_lead(self, name: str, host: float) -> None:
        """Keeps the device waiting longer the next time: the host took so many milliseconds."""
        self.lead[name] = min(2 * max(self.lead.get(name, 1.0), host), LONGEST_LEAD)

    def back_to_back(self, calls: Sequence[Call]) -> Timing:
        """Times all calls between two events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        host = _issued(calls, start, end)
        end.synchronize()
        return Timing(start.elapsed_time(end) / len(calls), host / len(calls))

    def recorded(self, calls: Sequence[Call]) -> Call:
        """Replays one CUDA graph; the calls must have run before."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def synchronize(self) -> None:
        """Waits for all streams."""
        torch.cuda.synchronize()


class HostTimer:
    """The host's clock, for a device that computes as it is called: the CPU."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def burst(self, name: str, calls: Sequence[Call]) -> Timing:
        """Times the calls together."""
        return self.back_to_back(calls)

    def back_to_back(self, calls: Sequence[Call]) -> Timing:
        """Times all calls together."""
        begun = self._clock()
        for call in calls:
            call()
        each = 1000 * (self._clock() - begun) / len(calls)
        return Timing(each, each)

    def recorded(self, calls: Sequence[Call]) -> Call:
        """Calls them."""

        def run() -> None:
            for call in calls:
                call()

        return run

    def synchronize(self) -> None:
        """Nothing is left to wait for."""


def alternate(
    contenders: Sequence[Contender], rounds: int, measure: Callable[[Contender, int], Timing], pause: float = 0.0
) -> Mapping[str, Statistics]:
    """Lets the contenders take turns.

    Args:
        contenders: in the order of their turns.
        rounds: how often each has its turn.
        measure: times one turn of a contender, in the round of that number.
        pause: seconds before each turn in which the device may cool down.

    Returns:
        the statistics of each, by name.
    """
    timings: dict[str, list[Timing]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders:
            time.sleep(pause)
            timings[contender.name].append(measure(contender, number))
    return {name: Statistics.of(found) for name, found in timings.items()}


def measure_single(
    timer: Timer, contenders: Sequence[Contender], rounds: int, pause: float = 0.0, calls: int = 1
) -> Mapping[str, Statistics]:
    """Each call by itself, or each burst of so many on one input set, after two calls of each that are not counted."""
    for contender in contenders:
        for number in range(2):
            contender.call(number)
    timer.synchronize()
    return alternate(
        contenders,
        rounds,
        lambda contender, number: timer.burst(contender.name, [partial(contender.call, number)] * calls),
        pause,
    )


def measure_back_to_back(
    timer: Timer, contenders: Sequence[Contender], rounds: int, calls: Mapping[str, int]
) -> Mapping[str, Statistics]:
    """Rows of calls, as many of each contender as `calls` says, over all input sets; all must have run before."""

    def measure(contender: Contender, number: int) -> Timing:
        turns = range(number, number + calls[contender.name])
        return timer.back_to_back([partial(contender.call, turn) for turn in turns])

    return alternate(contenders, rounds, measure)
