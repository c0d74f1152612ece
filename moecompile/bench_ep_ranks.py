"""The ranks of `python -m moecompile bench ep|overlap`: how they are started, meet, and time together.

    each timed region:  all ranks meet on the host, then on the devices; the slowest rank's time counts
    each step:          what fails on one rank is a failure on all; a rank that dies ends the others

Ranks meet over gloo on the host, so that a rank which waits for another does not wait for ever: `patience`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed, multiprocessing

from moecompile.bench_timing import ATTEMPTS, Call, CudaTimer, HostTimer, Timer, Timing

T = TypeVar("T")
FAILED = "failed"
PATIENCE = 600.0
"""Seconds that a rank waits for another, which may be compiling."""


class RanksFailedError(Exception):
    """Something failed on one rank at least; the message says on which ones and how. All ranks raise it together."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """One rank's view of all.

    Attributes:
        rank: its number.
        size: of all.
        device: its device.
        patience: seconds that it waits for another.
        control: a process group of the hosts.
    """

    rank: int
    size: int
    device: torch.device
    patience: float
    control: distributed.ProcessGroup

    @property
    def group(self) -> distributed.ProcessGroup:
        """Of all ranks, through which tokens travel."""
        found = distributed.group.WORLD
        assert found is not None
        return found

    def meet(self) -> None:
        """Returns when all ranks have called it; raises what `gathered` raises."""
        self._hear("meet", None)

    def gathered(self, word: T) -> list[T]:
        """What each rank says, in their order.

        Raises:
            RanksFailedError: another rank has failed meanwhile.
        """
        return self._hear("gathered", word)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Of each value the largest of all ranks; raises what `gathered` raises."""
        return [max(each) for each in zip(*self._hear("largest", list(values)), strict=True)]

    def attempt(self, function: Callable[[], T]) -> T:
        """What the function gives on this rank.

        Raises:
            RanksFailedError: it has failed on some rank. All raise it, wherever in the function they waited for that.
        """
        try:
            found = function()
        except RanksFailedError:  # all ranks know
            raise
        except Exception as error:  # the other ranks have to hear of it
            self._hear(FAILED, " ".join(f"{type(error).__name__}: {error}".split())[:400])
            raise
        self._hear("done", None)
        return found

    def _hear(self, step: str, word: T) -> list[T]:
        """What each rank says at the same step; all meetings are of this one kind, so that none misses a failure."""
        found: list[tuple[str, T]] = [(step, word)] * self.size
        distributed.all_gather_object(found, (step, word), self.control)
        failures = [f"rank {rank}: {each}" for rank, (at, each) in enumerate(found) if at == FAILED]
        if failures:
            raise RanksFailedError("; ".join(failures))
        if len({at for at, _ in found}) > 1:
            raise RanksFailedError(f"ranks are out of step: {', '.join(at for at, _ in found)}")
        return [each for _, each in found]


class RanksTimer:
    """A clock that all ranks read together: they start at once, and the slowest counts."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._cuda = CudaTimer() if ranks.device.type == "cuda" else None
        self._timer: Timer = self._cuda or HostTimer()
        self._word = torch.zeros(1, device=ranks.device)
        self._behind: set[str] = set()

    def burst(self, name: str, calls: Sequence[Call]) -> Timing:
        """As of `CudaTimer`, with a collective in front of it, behind which all devices go on.

        Whose host always falls behind, since it waits for its device, gets no second attempt.
        """
        cuda = self._cuda
        if cuda is None:
            return self._together(lambda: self._timer.burst(name, calls))
        for _ in range(1 if name in self._behind else ATTEMPTS):
            timing = self._together(lambda: cuda.attempt(name, calls, self._meet_on_devices))
            if timing.ahead:
                return timing
            cuda.give_lead(name, timing.host * len(calls))
        self._behind.add(name)
        cuda.lead.pop(name, None)
        return timing

    def back_to_back(self, calls: Sequence[Call]) -> Timing:
        """As of `CudaTimer`."""
        return self._together(lambda: self._timer.back_to_back(calls))

    def recorded(self, calls: Sequence[Call]) -> Call:
        """As of `CudaTimer`."""
        return self._timer.recorded(calls)

    def synchronize(self) -> None:
        """Waits until this rank's device is idle."""
        self._timer.synchronize()

    def _together(self, measure: Callable[[], Timing]) -> Timing:
        self._ranks.meet()
        mine = measure()
        device, host, behind = self._ranks.largest([mine.device, mine.host, not mine.ahead])
        return Timing(device, host, not behind)

    def _meet_on_devices(self) -> None:
        distributed.all_reduce(self._word, group=self._ranks.group)


Work = Callable[[Ranks], int]
"""What a rank does; returns an exit status, of which rank 0's counts. Found by name in processes of their own."""


def under_torchrun() -> bool:
    """Whether somebody else has started the ranks."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def run_here(work: Work, device: str, patience: float) -> int:
    """Does one rank's work in this process, which torchrun has started.

    Returns:
        the exit status: 1 if a rank has died or waited too long for another.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    with joined(rank, size, _place(device, local), patience, "env://") as ranks:
        status = work(ranks)
        return ranks.gathered(status)[0]


def run_spawned(work: Work, size: int, device: str, patience: float) -> int:
    """Does the work in `size` processes; `work` is a function of a module, or a partial of one.

    Returns:
        rank 0's exit status, or 1 if a rank has died; then the others are ended.
    """
    with tempfile.TemporaryDirectory(prefix="moecompile-bench-") as folder:
        try:
            multiprocessing.spawn(_spawned, (work, size, device, patience, folder), nprocs=size)
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            print(f"python -m moecompile bench: {error}", flush=True)
            return 1
        return int(_note(folder).read_text(encoding="utf-8"))


def _spawned(rank: int, work: Work, size: int, device: str, patience: float, folder: str) -> None:
    if device == "cpu":
        torch.set_num_threads(1)
    with joined(rank, size, _place(device, rank), patience, f"file://{folder}/store") as ranks:
        status = work(ranks)
        if rank == 0:
            _note(folder).write_text(str(status), encoding="utf-8")
        ranks.meet()


def _place(device: str, index: int) -> torch.device:
    return torch.device("cuda", index) if device == "cuda" else torch.device("cpu")


def _note(folder: str) -> Path:
    return Path(folder) / "status"


@contextlib.contextmanager
def joined(rank: int, size: int, device: torch.device, patience: float, meeting: str) -> Iterator[Ranks]:
    """Of the job while it lasts."""
    time = timedelta(seconds=patience)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    name = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(name, init_method=meeting, rank=rank, world_size=size, timeout=time)
    # Longer: those who wait on a device for a rank that failed shall come here, too, and hear of it.
    control = distributed.new_group(backend="gloo", timeout=2 * time)
    assert isinstance(control, distributed.ProcessGroup)
    yield Ranks(rank, size, device, patience, control)
    distributed.destroy_process_group()
