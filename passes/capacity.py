"""Masks of the capacity form (GShard, Switch): of assignments, and of their places (places.py).

    one_hot(ids)                         [ids[t] == e]                             marks
    place < capacity                     a condition on a number                   marks, of a Below
    one_hot(place, capacity)             [place == c]                              marks, of an At
    products of these                    1 where all of them hold                  marks
    weight * marks, sums over choices    the combine tensor                        marks with a weight, sums of marks

Conditions are kept as the model wrote them, and simplified only under conditions that stand in the same product:
mask * one_hot(place * mask) is mask * one_hot(place).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from moecompile.passes.interpret import Refused
from moecompile.passes.places import Condition, Number, is_trivial, number
from moecompile.passes.radix import difference, is_at_least
from moecompile.passes.substitution import substitute, substitute_part
from moecompile.passes.terms import (
    Affine,
    Apply,
    Atom,
    Constant,
    Content,
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
        return At(self.number.substituted(old, new), substitute_part(self.place, old, new))

    def inside(self) -> tuple[Content, ...]:
        """The number."""
        return (self.number,)


@dataclass(frozen=True)
class Marks(Condition):
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

    def always_holds(self) -> bool:
        """Whether nothing is left to ask."""
        return self.is_mask and all(is_trivial(mark) for mark in self.factors)

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
    return {mark for mark in found if not is_trivial(mark)}


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
