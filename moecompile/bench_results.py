"""What `python -m moecompile bench` found: a record for each row, floors and targets, print and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from moecompile.bench_bars import Bar
from moecompile.bench_timing import Statistics, Timer

GIB = 2**30


@dataclass(frozen=True)
class Floor:
    """The least time that a call can take: what it must compute or what it must move, whichever takes longer."""

    milliseconds: float
    of: str


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run.

    Attributes:
        flops: floating-point operations a second of the largest dense product, by precision.
        copied: bytes a second that a large copy reads and writes.
    """

    flops: Mapping[str, float]
    copied: float

    def floor(self, flops: float, moved: float, precision: str) -> Floor | None:
        """That of a call with so many floating-point operations and bytes; None where the ceiling is not known."""
        if precision not in self.flops:
            return None
        arithmetic, memory = 1000 * flops / self.flops[precision], 1000 * moved / self.copied
        return Floor(arithmetic, "arithmetic") if arithmetic >= memory else Floor(memory, "memory")


@dataclass(frozen=True)
class Target:
    """What a row has to reach: at least `ratio` times the speed (for memory, at most 1 / `ratio` of it) of another."""

    ratio: float
    against: str


@dataclass(frozen=True)
class Speed:
    """How fast one contender did one thing.

    Attributes:
        section: "block", "decode", "gemm", ...
        case: the sizes, by their short name.
        what: "forward", "forward+backward", ...
        contender: who.
        times: None where it is not there, and then `note` says why.
        flops: floating-point operations of a call.
        floor: the least time of a call.
        ratios: how many times as fast it is as another contender of the same run, by name.
        target: what is to be reached, if anything is.
        note: anything else.
    """

    section: str
    case: str
    what: str
    contender: str
    times: Statistics | None = None
    flops: float = 0.0
    floor: Floor | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    target: Target | None = None
    note: str = ""

    @property
    def rate(self) -> float | None:
        """Floating-point operations a second, in units of 10^12."""
        return self.flops / self.times.median / 1e9 if self.times is not None and self.flops else None

    @property
    def share(self) -> float | None:
        """The floor as a part of the time."""
        return self.floor.milliseconds / self.times.median if self.times is not None and self.floor else None

    @property
    def verdict(self) -> str:
        """Whether the target is met, in words; empty without one."""
        return verdict(self.target, self.ratios)

    def line(self) -> str:
        """The row in print."""
        if self.times is None:
            return f"  {self.contender:<26} {self.note}"
        rate = f"{self.rate:7.0f} TFLOP/s" if self.rate is not None else " " * 15
        share = f"{self.share:4.0%} of floor {self.floor.milliseconds:.3f} ({self.floor.of})" if self.floor else ""
        ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in self.ratios.items())
        in_time = "" if self.times.ahead else " (in the time)"
        host = f"host {self.times.host:.3f}{in_time}" if self.times.host else ""
        parts = (f"{share:<34}", host, ratios, self.verdict, self.note)
        words = "  ".join(part for part in parts if part)
        return (
            f"  {self.contender:<26} {self.times.median:9.4f} ms ±{self.times.spread / 2:4.0%} {rate}  {words}".rstrip()
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = {"teraflops": self.rate, "share_of_floor": self.share, "verdict": self.verdict}
        return {"kind": "speed", **dataclasses.asdict(self), **derived}


@dataclass(frozen=True)
class Memory:
    """What one call of a contender holds at most beyond what was held before it, in bytes.

    Attributes:
        section: as of `Speed`; so are `case`, `what`, `contender`, `ratios` (more is better) and `target`.
        case: see `section`.
        what: see `section`.
        contender: see `section`.
        peak: at its peak, gradients included.
        gradients: of it, the gradients that it leaves.
        copies: of it, quantised copies of the weights.
        held: quantised copies of the weights that were held before.
        ratios: see `section`.
        target: see `section`.
        label: in print, what `peak` is.
    """

    section: str
    case: str
    what: str
    contender: str
    peak: int
    gradients: int
    copies: int = 0
    held: int = 0
    ratios: Mapping[str, float] = field(default_factory=dict)
    target: Target | None = None
    label: str = "peak"

    @property
    def over(self) -> int:
        """The peak without the gradients and the quantised weights."""
        return self.peak - self.gradients - self.copies

    @property
    def verdict(self) -> str:
        """Whether the target is met, in words; empty without one."""
        return verdict(self.target, self.ratios)

    def line(self) -> str:
        """The row in print."""
        copies = f" + quantised weights {self.copies / GIB:.2f}" if self.copies else ""
        held = f", beside quantised weights of {self.held / GIB:.2f} GiB" if self.held else ""
        gradients = f"gradients {self.gradients / GIB:.2f}" if self.gradients else ""
        parts = f"{gradients}{copies} + {self.over / GIB:.2f}".removeprefix(" + ")
        peak = f"{self.label} {self.peak / GIB:6.2f} GiB = {parts}"
        return f"  {self.contender:<26} {peak}{held}  {self.verdict}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": "memory", **dataclasses.asdict(self), "over_gradients": self.over, "verdict": self.verdict}


@dataclass(frozen=True)
class Kernel:
    """What one kernel, or one kind of kernels, costs in a call: how often it runs and how long that takes.

    `most` is the largest share of the call that it may have, if there is such a target.
    """

    section: str
    case: str
    what: str
    contender: str
    kernel: str
    count: float
    milliseconds: float
    share: float
    most: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is met, in words; empty without one."""
        if self.most is None:
            return ""
        return f"target at most {self.most:.0%}: {'met' if self.share <= self.most else 'MISSED'}"

    def line(self) -> str:
        """The row in print."""
        words = f"{self.kernel[:100]}  {self.verdict}".rstrip()
        return f"    {self.milliseconds:9.4f} ms {self.share:5.1%} {self.count:5.1f} x  {words}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": "kernel", **dataclasses.asdict(self), "verdict": self.verdict}


Row = Speed | Memory | Kernel | Bar


def verdict(target: Target | None, ratios: Mapping[str, float]) -> str:
    """Whether a target is met, in words; empty without one, or where nobody was there to compare with."""
    if target is None or target.against not in ratios:
        return ""
    met = "met" if ratios[target.against] >= target.ratio else "MISSED"
    return f"target {target.ratio:g}x {target.against}: {met}"


def ratios(own: float, others: Mapping[str, float]) -> dict[str, float]:
    """How many times as large `own` is as each of the others that are not zero."""
    return {name: own / value for name, value in others.items() if value > 0}


class Results:
    """The rows so far, each printed as soon as it is there, and written as JSON if there is a place for that.

    Attributes:
        machine: what they were measured with.
        path: of the JSON, or None.
        stream: where they are printed; standard output if None.
        rows: all of them.
        failures: what did not come about, and why.
    """

    def __init__(self, machine: Mapping[str, Any], path: Path | None = None, stream: TextIO | None = None) -> None:
        self.machine, self.path, self.stream = machine, path, stream
        self.rows: list[Row] = []
        self.failures: list[str] = []

    def head(self, words: str) -> None:
        """A line above rows."""
        print(words, file=self.stream, flush=True)

    def add(self, *rows: Row) -> None:
        """Adds rows."""
        for row in rows:
            self.rows.append(row)
            print(row.line(), file=self.stream, flush=True)
        self._write()

    def fail(self, what: str, error: BaseException) -> None:
        """Notes that a measurement did not come about."""
        words = " ".join(f"{type(error).__name__}: {error}".split())[:600]
        self.failures.append(f"{what}: {words}")
        print(f"  FAILED {what}: {words}", file=self.stream, flush=True)
        self._write()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows: Sequence[dict[str, Any]] = [row.as_dict() for row in self.rows]
        return {"machine": dict(self.machine), "rows": rows, "failures": self.failures}

    def verdicts(self) -> tuple[int, int]:
        """How many rows have met their target, and how many have one."""
        found = [row.verdict for row in self.rows if row.verdict]
        return sum(words.endswith(": met") for words in found), len(found)

    def _write(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.as_dict(), indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run share.

    Attributes:
        device: "cuda", or "cpu" for a look without a GPU.
        timer: the device's clock.
        rounds: turns of each contender.
        ceilings: what the device reaches.
        results: where rows go.
        profile: whether kernels are listed, too.
    """

    device: str
    timer: Timer
    rounds: int
    ceilings: Ceilings
    results: Results
    profile: bool = False
