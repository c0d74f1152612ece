"""What a measured number has to reach: a row of `python -m moecompile bench ep` for each bar."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Limit:
    """A bar, set before it was measured.

    Attributes:
        of: what is measured: "time", "SMs", "speed against the baseline", ...
        sense: whether the number is to be at most or at least `number`.
        number: in `unit`.
        unit: "us", "x", "%", or empty.
        today: what others reach, with where and when it was measured; empty if that is the baseline of the same run.
    """

    of: str
    sense: Literal["at most", "at least"]
    number: float
    unit: str
    today: str = ""

    def holds(self, value: float) -> bool:
        """Whether a number reaches it."""
        return value <= self.number if self.sense == "at most" else value >= self.number

    @property
    def words(self) -> str:
        """In print: "at most 205 us"."""
        return f"{self.sense} {self.number:g} {self.unit}".rstrip()


@dataclass(frozen=True)
class Bar:
    """One number with its bar.

    Attributes:
        section: as of `bench_results.Speed`; so are `case`, `what` and `contender`.
        case: see `section`.
        what: see `section`.
        contender: see `section`.
        value: what was measured, in the limit's unit; None where it was not.
        limit: what is to be reached.
        inapplicable: why the bar says nothing about this run; empty if it does.
    """

    section: str
    case: str
    what: str
    contender: str
    value: float | None
    limit: Limit
    inapplicable: str = ""

    @property
    def verdict(self) -> str:
        """Whether it is reached, in words; empty where the bar does not apply or nothing was measured."""
        if self.inapplicable or self.value is None:
            return ""
        return f"target {self.limit.words}: {'met' if self.limit.holds(self.value) else 'MISSED'}"

    def line(self) -> str:
        """The row in print."""
        found = "not measured" if self.value is None else f"{self.value:.4g} {self.limit.unit}".rstrip()
        judged = self.verdict or f"target {self.limit.words}: not applicable, {self.inapplicable or 'nothing measured'}"
        today = f"  (today: {self.limit.today})" if self.limit.today else ""
        return f"    {self.contender}, {self.limit.of}: {found}  {judged}{today}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": "bar", **dataclasses.asdict(self), "verdict": self.verdict}
