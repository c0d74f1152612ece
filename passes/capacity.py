"""Meanings of the capacity form (GShard, Switch): masks of assignments, and which of its expert's places each takes.

    one_hot(ids)                         [ids[t] == e]                             marks
    one_hot(ids).cumsum(0)               e's assignments up to and including t     number, of a Running
    cumsum(0) + one_hot(first).sum(0)    ... after all first choices               number, of a Running and a Tally
    place * mask                         the number where marked, else 0           number with a condition
    place < capacity                     a condition on a number                   marks, of a Below
    one_hot(place, capacity)             [place == c]                              marks, of an At
    products of these                    1 where all of them hold                  marks
    weight * marks, sums over choices    the combine tensor                        marks with a weight, sums of marks

Numbers are exact (integers, or float32 that counts). Conditions are kept as the model wrote them, and simplified only
under conditions that stand in the same product: mask * one_hot(place * mask) is mask * one_hot(place).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from moecompile.passes import radix, substitution
from moecompile.passes.interpret import (
    Refused,
)
from moecompile.passes.slots import difference, is_at_least
from moecompile.passes.substitution import substitute
from moecompile.passes.terms import (
    Affine,
    Apply,
    Atom,
    Constant,
    Content,
    Count,
    Element,
    Equals,
    Fixed,
    Group,
    Looked,
    Meaning,
    Part,
    Size,
    Special,
    Variable,
)

_EARLIER = Variable("bound", "earlier")  # runs over the assignments of a Running
_COUNTED = Variable("bound", "counted")  # runs over the assignments of a Tally
_ROWS = Variable("bound", "rows")  # in between
_EXPERT = Variable("bound", "any expert")


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
        return Running(substitute(self.key, old, new), at, _part(self.expert, old, new))

    def inside(self) -> tuple[Content, ...]:
        """The key, and what the expert is looked up by."""
        return (self.key, *_looked(self.expert))


@dataclass(frozen=True)
class Tally(Meaning):
    """How many assignments are marked for expert `expert`.

    In `marks` the assignments are numbered in the key's own order.
    """

    marks: frozenset[Content]
    expert: Part

    def substituted(self, old: Atom, new: Part) -> Tally:
        """The count at another index."""
        return Tally(frozenset(substitute(mark, old, new) for mark in self.marks), _part(self.expert, old, new))

    def inside(self) -> tuple[Content, ...]:
        """The marks, and what the expert is looked up by."""
        return (*self.marks, *_looked(self.expert))


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


@dataclass(frozen=True)
class Below(Meaning):
    """[number < bound]."""

    number: Number
    bound: Size

    def substituted(self, old: Atom, new: Part) -> Below:
        """The condition at another index."""
        return Below(self.number.substituted(old, new), self.bound)

    def inside(self) -> tuple[Content, ...]:
        """The number."""
        return (self.number,)


@dataclass(frozen=True)
class At(Meaning):
    """[number == place]: a one-hot mask over an expert's places."""

    number: Number
    place: Part

    def substituted(self, old: Atom, new: Part) -> At:
        """The condition at another index."""
        return At(self.number.substituted(old, new), _part(self.place, old, new))

    def inside(self) -> tuple[Content, ...]:
        """The number."""
        return (self.number,)


@dataclass(frozen=True)
class Marks(Meaning):
    """The sum over `over` (choices) of `weight` (1 if None) where all `factors` hold, 0 elsewhere.

    Factors are Equals, Below and At.
    """

    factors: frozenset[Content]
    weight: Content | None = None
    over: Group = ()

    def substituted(self, old: Atom, new: Part) -> Marks:
        """The marks at another index."""
        factors = frozenset(substitute(mark, old, new) for mark in self.factors)
        weight = substitute(self.weight, old, new) if self.weight is not None else None
        over = tuple(new if atom == old and isinstance(new, Atom) else atom for atom in self.over)
        return Marks(simplified(factors), weight, over)

    def inside(self) -> tuple[Content, ...]:
        """Factors and weight."""
        return (*self.factors, *((self.weight,) if self.weight is not None else ()))

    @property
    def is_mask(self) -> bool:
        """Whether these are 0 and 1, one product of conditions."""
        return self.weight is None and not self.over


@dataclass(frozen=True)
class Sum(Meaning):
    """A sum of marks: one term for each choice."""

    marks: tuple[Marks, ...]

    def substituted(self, old: Atom, new: Part) -> Sum:
        """The sum at another index."""
        return Sum(tuple(term.substituted(old, new) for term in self.marks))

    def inside(self) -> tuple[Content, ...]:
        """The terms."""
        return self.marks


@dataclass(frozen=True)
class Support(Meaning):
    """[weight != 0], or [weight > 0] if `positive`: what a combine tensor's marks weigh once it is made a mask."""

    weight: Content
    positive: bool
    dtype: str | None = None  # as this dtype; None: as a mask

    def substituted(self, old: Atom, new: Part) -> Support:
        """The condition at another index."""
        return replace(self, weight=substitute(self.weight, old, new))

    def inside(self) -> tuple[Content, ...]:
        """The weight."""
        return (self.weight,)


def _part(part: Part, old: Atom, new: Part) -> Part:
    """One index with the digit `old` replaced, where it is that digit as a whole."""
    if part == old:
        return new
    if isinstance(part, Affine) and part.atom == old:
        return substitution.compose(part, new)
    return Looked(substitute(part.content, old, new), part.extent) if isinstance(part, Looked) else part


def _looked(part: Part) -> tuple[Content, ...]:
    return (part.content,) if isinstance(part, Looked) else ()


# ---- making numbers


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
        if isinstance(content, Marks) and all(_is_trivial(mark) for mark in content.factors):
            constant += count
        elif count:
            kept[content] = count
    conditions = frozenset(mark for mark in where if not _is_trivial(mark))
    return Number(frozenset(kept.items()), constant, conditions, otherwise if conditions else 0, most)


def _is_trivial(mark: Content) -> bool:
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


# ---- marks


def as_terms(content: Content) -> tuple[Marks, ...] | None:
    """A mask, or a sum of weighted masks, as its terms; None if it is something else."""
    if isinstance(content, Equals):
        return (Marks(frozenset({content})),)
    if isinstance(content, Marks):
        return (content,)
    if isinstance(content, Sum):
        return content.marks
    if isinstance(content, Special) and content.kind == "spread":
        mask, weight = content.about
        return (Marks(frozenset({mask}), weight),)
    return None


def of_terms(marks: Sequence[Marks]) -> Marks | Sum:
    """The sum of terms."""
    return marks[0] if len(marks) == 1 else Sum(tuple(marks))


def product(first: Marks, second: Marks) -> Marks:
    """Two masks multiplied; a sum over choices may stand on one side only."""
    if first.over and second.over:
        raise Refused("two sums over choices are multiplied")
    weights = [weight for weight in (first.weight, second.weight) if weight is not None]
    weight = Apply("mul", tuple(weights)) if len(weights) == 2 else next(iter(weights), None)
    factors = simplified(first.factors | second.factors)
    for mark in factors:
        if weight is not None and isinstance(mark, Equals) and isinstance(mark.atom, Atom):
            weight = substitute(weight, mark.atom, Looked(mark.content, mark.atom.size))
    return Marks(factors, weight, first.over + second.over)


def simplified(factors: Iterable[Content]) -> frozenset[Content]:
    """Conditions, each in the form it has given the others."""
    found = set(factors)
    while True:
        found = _by_own_expert(found)
        for mark in found:
            given = _given(mark, found - {mark})
            if given != {mark}:
                found = (found - {mark}) | given
                break
        else:
            return frozenset(found)


def _by_own_expert(factors: set[Content]) -> set[Content]:
    """Conditions with the expert that a mask picks looked up by its key, as its place is when it stands alone."""
    found = factors
    for equals in factors:
        if isinstance(equals, Equals) and isinstance(equals.atom, Atom):
            own = Looked(equals.content, equals.atom.size)
            found = {equals} | {substitute(mark, equals.atom, own) for mark in found if mark != equals}
    return {mark for mark in found if not _is_trivial(mark)}


def _given(mark: Content, others: set[Content]) -> set[Content]:
    """A condition where the others hold: simpler ones that say the same."""
    if not isinstance(mark, (Below, At)):
        return {mark}
    value = mark.number
    if value.where and value.where <= others:
        value = replace(value, where=frozenset(), otherwise=0)
    if value.most is not None and not value.where and _stays_below(replace(value, most=None), value.most + 1, others):
        value = replace(value, most=None)
    if isinstance(mark, Below):
        return {Below(value, mark.bound)}
    where: frozenset[Content] = frozenset()
    if value.where and not _may_be(value.otherwise, mark.place):
        where, value = value.where, replace(value, where=frozenset(), otherwise=0)
    place = mark.place
    if isinstance(place, Affine) and place.step == 1 and not value.where and value.most is None:
        value, place = replace(value, constant=value.constant - place.start), place.atom
    if isinstance(place, Fixed) and place.extent != 1 and not value.where and value.most is None:
        value, place = replace(value, constant=value.constant - place.index), Fixed(0, 1)
    return {At(value, place), *where}


def _stays_below(value: Number, bound: Size, others: set[Content]) -> bool:
    """Whether one of the other conditions says that the number is below the bound."""
    return any(isinstance(mark, Below) and mark.number == value and is_at_least(bound, mark.bound) for mark in others)


def _may_be(value: Size, place: Part) -> bool:
    """Whether a place can be this number."""
    if isinstance(place, Fixed):
        return difference(value, place.index) in (0, None)
    if isinstance(place, Affine) and place.step == 1:
        value, place = value - place.start, place.atom
    return not isinstance(place, Atom) or not (is_at_least(value, place.size) or is_at_least(-1, value))


def own_expert(content: Number | Marks, expert: Atom) -> Number | Marks:
    """The sum over all experts: what stands at the assignment's own, where everything else is 0."""
    marks = content.where if isinstance(content, Number) else content.factors
    keys = [mark.content for mark in marks if isinstance(mark, Equals) and mark.atom == expert]
    if len(keys) != 1 or (isinstance(content, Number) and content.otherwise != 0):
        raise Refused("a sum over experts of something that is not 0 away from an assignment's own expert")
    return content.substituted(expert, Looked(keys[0], expert.size))


def over_choices(marks: Marks, over: Group, node: fx.Node) -> Marks:
    """The sum of marks over some digits of their assignments, at a node whose sum it is."""
    if marks.over:
        raise Refused("a second sum over choices")
    factors, weight = marks.factors, marks.weight
    bound = []
    for place, digit in enumerate(over):
        atom = Atom(Variable("bound", (node, "choice", place)), 1, digit.size)
        bound.append(atom)
        factors = frozenset(substitute(mark, digit, atom) for mark in factors)
        weight = substitute(weight, digit, atom) if weight is not None else None
    return Marks(factors, weight, tuple(bound))


def scaled(value: Number, other: Content) -> Number:
    """A number times a number of Python's, or times a mask."""
    if isinstance(other, Constant) and isinstance(other.value, int):
        if value.most is not None:
            raise Refused("a clamped place that is scaled")
        items = {content: count * other.value for content, count in value.items}
        return number(items, value.constant * other.value, value.where, value.otherwise * other.value)
    marks = as_terms(other)
    if marks is None or len(marks) != 1 or not marks[0].is_mask:
        raise Refused("places of assignments multiplied by something else than a mask")
    factors = marks[0].factors
    if not value.where <= factors and value.otherwise != 0:
        raise Refused("places of assignments masked by different masks")
    return number(dict(value.items), value.constant, value.where | factors, 0, value.most)
