"""What numbers and rows mean that ranks of expert parallelism exchange: the contents of passes/rules_exchange.py.

E experts lie on R ranks, E / R on each, in their order. Every rank sorts its assignments by expert, and sends each
rank its own. All ranks run the same program, so what comes is what this program sends from there:

    counts[e]                    this rank's assignments of expert e
    came = all_to_all(counts)    (R * E / R,)  segments of what arrives: rank r's assignments of this rank's expert e
    rows = all_to_all(x[order // k], came per rank, counts per rank)
                                 the assignments of all ranks, of this rank's experts: segment by segment, r first

A row that has arrived is `Sent`: what it is at home, where its assignment is called what it is called there. Its
expert, counted from this rank's first, is `Own`. Whole numbers about segments are a `Tally`, a sum of whole multiples
of a few symbols, so that equal numbers are equal terms in whatever way they were computed:

    came                         "count"
    came.cumsum(0)               where segments end, lying in this order; a group of digits is the symbol's name
    came.view(R, -1).t()         "count", its dims (e), (r): the same segments in another order

`Segment` is the number of the segment that a row lies in, once segments lie sorted by expert. At such a row

    ends where segments lie as they came - ends where they lie by expert + position

is the row's place among what came: the permutation, sorted by expert, that a grouped GEMM needs. Whoever reads rows at
it has brought them in order; nothing else has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from moecompile.passes import radix
from moecompile.passes.terms import Atom, Content, Element, Group, Index, Meaning, Part, Size, Special, Variable

Term: TypeAlias = "str | Group"
"""COUNT, POSITION, or where segments end that lie in this order."""
COUNT, POSITION = "count", "position"


@dataclass(frozen=True)
class Exchange:
    """Assignments on their way between the ranks of a group, each to the rank of its expert.

    Attributes:
        key: the expert of an assignment, at home.
        num_experts: of all ranks.
        ranks: that share them.
        group: the process group's name.
    """

    key: Element
    num_experts: int
    ranks: int
    group: str

    @property
    def here(self) -> int:
        """Experts of each rank."""
        return self.num_experts // self.ranks

    @property
    def segments(self) -> Variable:
        """Runs over the segments of what arrives, as it comes."""
        return Variable("segments", self)

    @property
    def rank(self) -> Atom:
        """The digit of the rank that a segment comes from."""
        return Atom(self.segments, self.here, self.ranks)

    @property
    def expert(self) -> Atom:
        """The digit of a segment's expert, counted from this rank's first."""
        return Atom(self.segments, 1, self.here)

    @property
    def by_rank(self) -> Group:
        """The segments as they come."""
        return radix.merge((self.rank, self.expert))

    @property
    def by_expert(self) -> Group:
        """The segments sorted by expert."""
        return radix.merge((self.expert, self.rank))

    def arrived(self, size: Size) -> Atom:
        """Runs over the rows that arrive, as they come."""
        return Atom(Variable("arrived", self), 1, size)

    def in_order(self, size: Size) -> Atom:
        """Runs over the same rows, sorted by expert."""
        return Atom(Variable("order", self, (self.arrived(size),), Own(self)), 1, size)


@dataclass(frozen=True)
class Leaving(Meaning):
    """How many of this rank's assignments belong to experts of each rank, or of one."""

    key: Element
    num_experts: int
    ranks: int
    rank: int | None = None

    def substituted(self, old: Atom, new: Part) -> Content:
        """No index is in it."""
        return self


@dataclass(frozen=True)
class Arriving(Meaning):
    """How many assignments arrive from each rank, or from one."""

    exchange: Exchange
    rank: int | None = None

    def substituted(self, old: Atom, new: Part) -> Content:
        """No index is in it."""
        return self


@dataclass(frozen=True)
class Own(Meaning):
    """The expert of a row that has arrived, counted from this rank's first."""

    exchange: Exchange

    def substituted(self, old: Atom, new: Part) -> Content:
        """No index is in it but that of the row, which has no name beside the exchange's."""
        return self


@dataclass(frozen=True)
class Segment(Meaning):
    """The segment that a row lies in, among segments sorted by expert."""

    exchange: Exchange

    def substituted(self, old: Atom, new: Part) -> Content:
        """Known along all rows in order alone."""
        return _unless_moved(self, self.exchange, old, new)


@dataclass(frozen=True)
class Tally(Meaning):
    """A whole number about each segment; `at_rows`: about the segment that each row lies in, rows sorted by expert."""

    exchange: Exchange
    terms: frozenset[tuple[Term, int]]
    at_rows: bool = False

    def substituted(self, old: Atom, new: Part) -> Content:
        """Known along all segments, or all rows, alone."""
        return _unless_moved(self, self.exchange, old, new)


@dataclass(frozen=True)
class Sent(Meaning):
    """A row that has arrived: what it is at home, among rows sorted in this order."""

    exchange: Exchange
    order: Atom
    content: Content

    def substituted(self, old: Atom, new: Part) -> Content:
        """Of the row's features, which are called at home what they are called here."""
        from moecompile.passes.substitution import substitute

        return Sent(self.exchange, self.order, substitute(self.content, old, new))

    def inside(self) -> tuple[Content, ...]:
        """What it is at home."""
        return (self.content,)


def _unless_moved(content: Tally | Segment, exchange: Exchange, old: Atom, new: Part) -> Content:
    mine = old.variable == exchange.segments or old.variable.by == Own(exchange)
    return Special("moved", (content, old, new)) if mine else content


def tally(exchange: Exchange, terms: Iterable[tuple[Term, int]], at_rows: bool = False) -> Tally:
    """The sum of these multiples."""
    total: dict[Term, int] = {}
    for term, factor in terms:
        total[term] = total.get(term, 0) + factor
    return Tally(exchange, frozenset((term, factor) for term, factor in total.items() if factor), at_rows)


def as_place(found: Tally, row: Atom) -> Content:
    """Where a row in order lies among those that came, if that is what the number says; else the number.

    Args:
        found: a number at each row.
        row: the index that runs over the rows in order.
    """
    exchange = found.exchange
    place = tally(exchange, ((exchange.by_rank, 1), (exchange.by_expert, -1), (POSITION, 1)), at_rows=True)
    return Index(row.variable.group) if found == place else found
