"""What each kernel of a call costs, by torch's profiler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moecompile.bench_proof import PREFIX, NotOursError
from moecompile.bench_results import Kernel, Setting
from moecompile.bench_timing import Contender

CALLS = 3
SHOWN = 14


def kernels(setting: Setting, contender: Contender, section: str, case: str, what: str) -> list[Kernel]:
    """The kernels of one call, on average over a few, the most expensive first.

    Args:
        setting: on the CPU, operators are listed in the place of kernels.
        contender: what is called; it must have run before.
        section: as of `Kernel`; so are `case` and `what`.
        case: see `section`.
        what: see `section`.

    Returns:
        the first SHOWN of them, then one for all others.
    """
    row = (section, case, what, contender.name)
    return [Kernel(*row, *each) for each in dearest(averages(setting, contender), SHOWN)]


def dearest(found: Iterable[tuple[str, float, float]], most: int) -> list[tuple[str, float, float, float]]:
    """So many kernels, those that cost most first, one entry for the others, and one for all.

    Args:
        found: as `averages` has it.
        most: how many have an entry of their own.

    Returns:
        the same with each one's share of the time.
    """
    ordered = sorted(found, key=lambda each: -each[2])
    shown, rest = ordered[:most], ordered[most:]
    if rest:
        shown.append((f"{len(rest)} others", *_sums(rest)))
    shown.append(("all", *_sums(ordered)))
    total = shown[-1][2] or 1.0
    return [(*each, each[2] / total) for each in shown]


def _sums(found: Sequence[tuple[str, float, float]]) -> tuple[float, float]:
    return sum(each[1] for each in found), sum(each[2] for each in found)


def own_kernels(setting: Setting, contender: Contender) -> tuple[float, float]:
    """How many of moecompile's kernels a call runs, and their time in milliseconds, on average over a few calls.

    Raises:
        NotOursError: none ran, or not as many in each call.
    """
    own = [each for each in averages(setting, contender) if each[0].startswith(PREFIX)]
    if not own:
        raise NotOursError("the profiler saw none of moecompile's kernels")
    count = sum(each[1] for each in own)
    if abs(count - round(count)) > 0.01:
        raise NotOursError(f"the profiler saw {count:.2f} of moecompile's kernels a call: it has lost some")
    return count, sum(each[2] for each in own)


def averages(setting: Setting, contender: Contender) -> list[tuple[str, float, float]]:
    """Each kernel of a call, on the CPU each operator: its name, how often it runs, and its milliseconds in all."""
    on_gpu = setting.device == "cuda"
    setting.timer.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        for number in range(CALLS):
            contender.call(number)
        setting.timer.synchronize()
    found: list[tuple[str, float, float]] = []
    for event in profiled.key_averages():
        if getattr(event, "is_user_annotation", False) or (event.device_type == DeviceType.CPU) == on_gpu:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append((str(event.key), event.count / CALLS, microseconds / 1000 / CALLS))
    return found
