"""A line of the doctor's table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        item: what was looked at.
        state: "ok"; "note": nothing is wrong, but worth knowing; "missing": not needed on a CPU; "error": needed
            everywhere.
        found: what is there, in a few words.
        cure: what to do about it; empty where nothing is to be done.
    """

    item: str
    state: Literal["ok", "note", "missing", "error"]
    found: str
    cure: str = ""

    def as_dict(self) -> dict[str, str]:
        """The finding as a plain dict, for JSON."""
        return dataclasses.asdict(self)
