"""Which assignments keep a place in their experts' bins, and the proof that no two of them stand at one place.

An assignment's place is a running count of its own expert's assignments up to itself, so it grows by one from each to
the next; where choices have running counts of their own, those of one choice begin after all kept ones of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moecompile.passes import radix
from moecompile.passes.capacity import Below
from moecompile.passes.interpret import Refused, walk
from moecompile.passes.places import Number, Running, Tally, any_expert, closed, counted
from moecompile.passes.radix import is_at_least
from moecompile.passes.terms import Atom, Content, Element, Equals, Group, Looked, Part, Size, Variable

ASSIGNMENT = Variable("ids", "assignment")
"""Runs over a block's assignments, token-major: what the contents of rows in places speak of."""


@dataclass(frozen=True)
class Column:
    """One choice of each token, or several that share a running count: the expert, the place, what it is kept below."""

    key: Element
    place: Number
    bound: Size


@dataclass(frozen=True)
class Routing:
    """Which assignments a dispatch tensor keeps, and their places. Contents speak of ASSIGNMENT."""

    columns: tuple[Column, ...]
    tokens: tuple[Size, ...]
    top_k: Size
    num_experts: Size
    capacity: Size
    domains: frozenset[int]  # the tokens' digits that have a running count each: groups

    def __str__(self) -> str:
        return "the expert ids"

    @property
    def token_digits(self) -> tuple[Atom, ...]:
        """The tokens' digits, most significant first."""
        digits: list[Atom] = []
        divisor: Any = self.top_k
        for size in reversed(self.tokens):
            digits.insert(0, Atom(ASSIGNMENT, divisor, size))
            divisor = divisor * size
        return tuple(digits)

    @property
    def key(self) -> Element:
        """The expert's id of an assignment, as the operator takes it: -1 where it was dropped."""
        whole = Atom(ASSIGNMENT, 1, self.top_k * radix.product(self.tokens))
        return Element(self, radix.merge([whole]))  # type: ignore[arg-type]


def prove_disjoint(columns: Sequence[Column], draft: Routing) -> frozenset[int]:
    """Raises Refused unless places are unique; returns the tokens' digits that must have places of their own."""
    tokens = draft.token_digits
    shared = len(columns) == 1 and draft.top_k != 1
    choices: Group = (Atom(ASSIGNMENT, 1, draft.top_k),) if shared else ()
    domains: set[int] = set()
    for column in columns:
        counted_by = [part for part in _counted_by(column) if isinstance(part, Atom)]
        if shared and not _covers(counted_by, choices[0]):
            raise Refused("choices whose places are counted apart share them")
        domains |= {number for number, digit in enumerate(tokens) if digit.size != 1 and not _covers(counted_by, digit)}
    inside = tuple(digit for number, digit in enumerate(tokens) if number not in domains)
    for column in columns:
        _check_offset(column, inside + choices)
    for number, first in enumerate(columns):
        for second in columns[number + 1 :]:
            if not _after(second, first, inside, draft) and not _after(first, second, inside, draft):
                raise Refused(
                    "two choices of an expert may stand at one place: neither's places begin after the other's"
                )
    return frozenset(domains)


def _covers(digits: Sequence[Atom], digit: Atom) -> bool:
    """Whether a digit is one of the digits, or a part of one."""
    return any(
        own.variable == digit.variable
        and (below := radix.divide(digit.divisor, own.divisor)) is not None
        and radix.divide(own.size, below * digit.size) is not None
        for own in digits
    )


def _counted_by(column: Column) -> tuple[Part, ...]:
    """The digits of the running count that a place is: that of its own expert's assignments, itself the last.

    No digits where each assignment is counted for itself alone.
    """
    if not column.place.items:
        return ()
    runs = [(content, count) for content, count in column.place.items if isinstance(content, Running)]
    if len(runs) != 1 or runs[0][1] != 1:
        raise Refused("places of assignments that are not one running count of their expert's assignments")
    run = runs[0][0]
    if not isinstance(run.expert, Looked) or run.expert.content != column.key:
        raise Refused("places of assignments that are counted for another expert")
    if closed(column.key, run.at) != run.key:
        raise Refused("places of assignments that are counted over other expert ids")
    return run.at


def _check_offset(column: Column, inside: Group) -> None:
    """What is added to a running count must be the same for all that it counts, and leave places at 0 or more."""
    least = column.place.least()
    if least is None or least < 0:
        raise Refused("places of assignments that may be negative")
    for content, _ in column.place.items:
        if isinstance(content, Running):
            continue
        if not isinstance(content, Tally) or content.expert != Looked(column.key, _extent(content.expert)):
            raise Refused("places of assignments with something else than counts of their expert added")
        for mark in content.marks:
            for part in (part for inner in walk(mark) if isinstance(inner, Element) for part in inner.index):
                if isinstance(part, Atom) and any(radix.overlap(part, digit) for digit in inside):
                    raise Refused("places of assignments begin after counts that differ between them")


def _extent(part: Part) -> Size:
    return part.extent if isinstance(part, Looked) else 0


def _after(later: Column, earlier: Column, inside: Group, draft: Routing) -> bool:
    """Whether one choice's places begin after all kept ones of the other: the count of those, or of more, is added."""
    more = _tallies(later)
    for marks, count in _tallies(earlier).items():
        if more.get(marks, 0) < count:
            return False
        more[marks] -= count
    if later.place.constant < earlier.place.constant:
        return False
    expert = any_expert(draft.num_experts)
    kept = counted((Equals(earlier.key, expert), earlier.place), earlier.key, inside)
    key = next(mark for mark in kept if isinstance(mark, Equals))
    place = next(mark for mark in kept if isinstance(mark, Number))
    for marks, count in more.items():
        bounds = [mark for mark in marks if isinstance(mark, Below)]
        if count > 0 and key in marks and len(bounds) + 1 == len(marks):
            if all(mark.number == place and is_at_least(mark.bound, earlier.bound) for mark in bounds):
                return True
    return False


def _tallies(column: Column) -> dict[frozenset[Content], int]:
    return {content.marks: count for content, count in column.place.items if isinstance(content, Tally)}
