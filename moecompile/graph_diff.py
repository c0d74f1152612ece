"""What changed between two printed graphs (`moecompile.passes.printer`), line by line.

Nodes are numbered by order, so one node less renumbers all that follow. Lines are compared without their numbers first;
lines found equal are then checked with the numbers translated, so that an operation that now reads another value shows
as changed too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_NUMBER = re.compile(r"%\d+")


@dataclass(frozen=True)
class Row:
    """One line of a side-by-side view.

    Attributes:
        kind: "same", "removed", "added", or "rewired": the same operation on other values.
        before: the line's index in the first graph, None if it has none.
        after: the line's index in the second graph, None if it has none.
    """

    kind: Literal["same", "removed", "added", "rewired"]
    before: int | None
    after: int | None


def diff_rows(before: list[str], after: list[str]) -> list[Row]:
    """The rows of a side-by-side view of two graphs, given as lines."""
    matcher = difflib.SequenceMatcher(
        None, [_NUMBER.sub("%", line) for line in before], [_NUMBER.sub("%", line) for line in after], autojunk=False
    )
    rows: list[Row] = []
    renumbered: dict[str, str] = {}
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag == "equal":
            for i, j in zip(range(start, end), range(other_start, other_end), strict=True):
                rows.append(Row("same" if _same(before[i], after[j], renumbered) else "rewired", i, j))
        else:
            rows += [Row("removed", i, None) for i in range(start, end)]
            rows += [Row("added", None, j) for j in range(other_start, other_end)]
    return rows


def unified(before: str, after: str, context: int = 2) -> Iterator[str]:
    """A unified diff of two graphs; unchanged lines carry the second graph's numbers."""
    lines, other = before.splitlines(), after.splitlines()
    rows = diff_rows(lines, other)
    changed = [place for place, row in enumerate(rows) if row.kind != "same"]
    shown = {near for place in changed for near in range(place - context, place + context + 1)}
    skipped = 0
    for place, row in enumerate(rows):
        if place not in shown:
            skipped += 1
            continue
        if skipped:
            yield f"@@ {skipped} unchanged @@"
            skipped = 0
        if row.before is not None and row.kind != "same":
            yield f"-{lines[row.before]}"
        if row.after is not None:
            yield f"{' ' if row.kind == 'same' else '+'}{other[row.after]}"
    if skipped:
        yield f"@@ {skipped} unchanged @@"


def _same(before: str, after: str, renumbered: dict[str, str]) -> bool:
    """Whether two lines that are equal but for their numbers read corresponding values; notes the value they make."""
    numbers, others = _NUMBER.findall(before), _NUMBER.findall(after)
    if " = " in before and before.startswith("%"):
        renumbered[numbers.pop(0)] = others.pop(0)
    return [renumbered.get(number) for number in numbers] == others
