"""Numbers of the capacity form (GShard, Switch): which of its expert's places an assignment takes.

    one_hot(ids).cumsum(0)               e's assignments up to and including t     number, of a Running
    cumsum(0) + one_hot(first).sum(0)    ... after all first choices               number, of a Running and a Tally
    place * mask                         the number where marked, else 0           number with a condition

Numbers are exact (integers, or float32 that counts). The masks that they stand in: capacity.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moecompile.passes import radix, substitution
from moecompile.passes.interpret import Refused
from moecompile.passes.substitution import substitute
from moecompile.passes.terms import (
    Atom,
    Content,
    Count,
    Element,
    Equals,
    Group,
    Looked,
    Meaning,
    Part,
    Size,
    Variable,
)

_EARLIER = Variable("bound", "earlier")  # runs over the assignments of a Running
_COUNTED = Variable("bound", "counted")  # runs over the assignments of a Tally
_ROWS = Variable("bound", "rows")  # in between
_EXPERT = Variable("bound", "any expert")


class Condition(Meaning):
    """What is 1 where something holds and 0 elsewhere."""

    def always_holds(self) -> bool:
        """Whether it is 1 everywhere."""
        return False


@dataclass(frozen=True)
class Running(Meaning):
    """How many assignments up to and including number `at` have expert `expert`: a cumsum over a one-hot mask.

    `key` is the expert id of an assignment, by its number in the order of the sum.
    """

    key: Content
    at: tuple[Part, ...]
    expert: Part

    def substituted(self, old: Atom, new: Part) -> Running:
        """The sum at another index."""
        at = substitution.substitute_index(self.at, old, new)
        return Running(substitute(self.key, old, new), at, substitution.substitute_part(self.expert, old, new))

    def inside(self) -> tuple[Content, ...]:
        """The key, and what the expert is looked up by."""
        return (self.key, *looked_up_by(self.expert))


@dataclass(frozen=True)
class Tally(Meaning):
    """How many assignments are marked for expert `expert`.

    In `marks` the assignments are numbered in the key's own order.
    """

    marks: frozenset[Content]
    expert: Part

    def substituted(self, old: Atom, new: Part) -> Tally:
        """The count at another index."""
        return Tally(
            frozenset(substitute(mark, old, new) for mark in self.marks),
            substitution.substitute_part(self.expert, old, new),
        )

    def inside(self) -> tuple[Content, ...]:
        """The marks, and what the expert is looked up by."""
        return (*self.marks, *looked_up_by(self.expert))


@dataclass(frozen=True)
class Number(Meaning):
    """Where all of `where` hold, min(constant + the sum of count * content over `items`, most).

    Elsewhere `otherwise`.
    """

    items: frozenset[tuple[Content, int]]
    constant: int = 0
    where: frozenset[Content] = frozenset()
    otherwise: Size = 0
    most: Size | None = None

    def substituted(self, old: Atom, new: Part) -> Number:
        """The number at another index."""
        items: Counter[Content] = Counter()
        for content, count in self.items:
            items[substitute(content, old, new)] += count
        where = (substitute(mark, old, new) for mark in self.where)
        return number(items, self.constant, where, self.otherwise, self.most)

    def inside(self) -> tuple[Content, ...]:
        """Items and conditions."""
        return (*(content for content, _ in self.items), *self.where)

    def least(self) -> int | None:
        """The least value the number can have where its condition holds.

        None if that is not known. An assignment counts itself.
        """
        if any(count < 0 for _, count in self.items):
            return None
        own = sum(
            count
            for content, count in self.items
            if isinstance(content, Running) and self._counts_itself(content, self.where)
        )
        return self.constant + own

    @staticmethod
    def _counts_itself(content: Running, where: frozenset[Content]) -> bool:
        """Whether the assignment at the end of the running sum is one of the expert's, so that the sum is 1 or more."""
        own = [mark.content for mark in where if isinstance(mark, Equals) and mark.atom == content.expert]
        own += [part.content for part in (content.expert,) if isinstance(part, Looked)]
        return any(closed(key, content.at) == content.key for key in own)


def looked_up_by(part: Part) -> tuple[Content, ...]:
    """What an index is looked up by."""
    return (part.content,) if isinstance(part, Looked) else ()


def number(
    items: Mapping[Content, int],
    constant: int = 0,
    where: Iterable[Content] = (),
    otherwise: Size = 0,
    most: Size | None = None,
) -> Number:
    """A number in its simplest form: no conditions that always hold, nothing counted zero times."""
    kept: dict[Content, int] = {}
    for content, count in items.items():
        if isinstance(content, Condition) and content.always_holds():
            constant += count
        elif count:
            kept[content] = count
    conditions = frozenset(mark for mark in where if not is_trivial(mark))
    return Number(frozenset(kept.items()), constant, conditions, otherwise if conditions else 0, most)


def is_trivial(mark: Content) -> bool:
    """[key == key]: the expert looked up by the assignment's own id."""
    return isinstance(mark, Equals) and isinstance(mark.atom, Looked) and mark.atom.content == mark.content


def numbered(content: Content, digits: Sequence[Atom], variable: Variable) -> Content:
    """The content with these digits, most significant first, as one number: the variable's."""
    divisor: Size = radix.product(digit.size for digit in digits)
    for digit in digits:
        rest = radix.divide(divisor, digit.size)
        assert rest is not None
        divisor = rest
        content = substitute(content, digit, Atom(variable, divisor, digit.size))
    return content


def closed(key: Content, at: Sequence[Part]) -> Content | None:
    """The key by the number of its assignment in the order of a running sum; None if the number is not all digits."""
    digits = [part for part in at if isinstance(part, Atom)]
    return numbered(key, digits, _EARLIER) if len(digits) == len(at) else None


def running(key: Content, order: Group, expert: Part) -> Number:
    """An inclusive cumsum, in this order, over the one-hot mask of a key."""
    return number({Running(numbered(key, order, _EARLIER), order, expert): 1})


def counted(marks: Iterable[Content], key: Content, rows: Group) -> frozenset[Content]:
    """Marks with their assignments, the digits `rows`, numbered in the order of the key's index.

    Refused if the key lacks one of them.
    """
    by_row = numbered(key, rows, _ROWS)
    parts = by_row.index if isinstance(by_row, Element) else ()
    own = [part for part in parts if isinstance(part, Atom) and part.variable == _ROWS]
    if radix.group_size(own) != radix.group_size(rows):
        raise Refused("expert ids that repeat are counted")
    return frozenset(numbered(numbered(mark, rows, _ROWS), own, _COUNTED) for mark in marks)


def tally(marks: frozenset[Content], rows: Group, expert: Atom) -> Number:
    """How many of the assignments `rows` are marked for each expert."""
    keys = [mark.content for mark in marks if isinstance(mark, Equals) and mark.atom == expert]
    if len(keys) != 1:
        raise Refused("a sum over a mask of something else than experts")
    found = counted(marks, keys[0], rows)
    return number({Tally(frozenset(substitute(mark, expert, any_expert(expert.size)) for mark in found), expert): 1})


def any_expert(num_experts: Size) -> Atom:
    """The expert in the marks of a tally."""
    return Atom(_EXPERT, 1, num_experts)


def tally_of_count(content: Count, expert: Atom) -> Number:
    """Counts of all assignments by expert, as a tally."""
    parts = content.key.index if isinstance(content.key, Element) else ()
    rows = tuple(part for part in parts if isinstance(part, Atom))
    return tally(frozenset({Equals(content.key, expert)}), rows, expert)
