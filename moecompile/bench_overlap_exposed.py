"""How long a call communicates, and for how much of that nothing else runs, by torch's profiler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moecompile.bench_timing import Call

COMMUNICATES = ("exchange_send", "exchange_receive", "exchange_home", "exchange_gate", "nccl")
"""Parts of the names of kernels that move rows between ranks, or wait for them."""
Span = tuple[float, float]


@dataclass(frozen=True)
class Exposed:
    """Of one call, in milliseconds.

    Attributes:
        communicating: in which a kernel that communicates runs.
        exposed: of these, in which no other kernel runs.
    """

    communicating: float
    exposed: float


def measure_exposed(call: Call, calls: int = 3) -> Exposed | None:
    """On average over so many calls; None if the profiler saw no kernel."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    spans: dict[bool, list[Span]] = {True: [], False: []}
    for event in profiled.events() or ():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            communicates = any(each in event.name for each in COMMUNICATES)
            spans[communicates].append((event.time_range.start, event.time_range.end))
    return exposed(spans[True], spans[False], calls) if any(spans.values()) else None


def exposed(communicating: Iterable[Span], others: Iterable[Span], calls: int = 1) -> Exposed:
    """Of spans in microseconds, which may overlap."""
    of_both, of_others = joined([*communicating]), joined([*others])
    hidden = sum(max(0.0, min(end, last) - max(begin, first)) for begin, end in of_both for first, last in of_others)
    total = sum(end - begin for begin, end in of_both)
    return Exposed(total / calls / 1000, (total - hidden) / calls / 1000)


def joined(spans: Sequence[Span]) -> list[Span]:
    """The same time, in order, by spans that do not overlap."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found
