"""Dispatch and combine tensors: rows put into their experts' places by one, and read back by the other.

    rows[e, c]  = sum over t of D[t, e, c] * x[t]
    y[e, c]     = expert e of rows[e, c]
    out[t]      = sum over e, c of C[t, e, c] * y[e, c]

D and C are the sum over a token's choices k of weight[t, k] * [ids[t, k] == e] * [place[t, k] == c], and 0 where the
place is not below the capacity. No two assignments of an expert have one place (passes/routing.py proves it), so
rows[e, c] is one token's row or zeros, and out[t] is the sum over k of weight * y of the choices that were not dropped.

In the rows' dims an expert and a place are digits of a variable of kind "places"; their content speaks of the
assignment that stands there, and says nothing of places where none stands. The products themselves are in
passes/rules_dispatch.py, what becomes of empty places in passes/vacant.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from moecompile.passes import radix, substitution
from moecompile.passes.capacity import At, Below, Marks, Support, as_terms
from moecompile.passes.interpret import Interpretation, Refused
from moecompile.passes.merge import expert_atom, merge
from moecompile.passes.radix import is_at_least
from moecompile.passes.routing import ASSIGNMENT, Column, Routing, prove_disjoint
from moecompile.passes.rules_routing import id_range
from moecompile.passes.substitution import substitute
from moecompile.passes.terms import (
    Apply,
    Atom,
    Content,
    Element,
    Equals,
    Fixed,
    Group,
    Looked,
    Part,
    Size,
    Special,
    Value,
    Variable,
)


@dataclass(frozen=True)
class Places:
    """What the digits of a variable of kind "places" are: groups, expert, place."""

    routing: Routing
    groups: tuple[int, ...]  # which of the tokens' digits have places of their own

    @property
    def variable(self) -> Variable:
        """Runs over all places."""
        return Variable("places", self)

    def expert(self, divisor: Size = 1, size: Size | None = None) -> Atom:
        """The expert's digit, or a digit of it."""
        return Atom(self.variable, self.routing.capacity * divisor, self.routing.num_experts if size is None else size)

    def group(self, number: int) -> Atom:
        """The digit of one group."""
        divisor: Any = self.routing.num_experts * self.routing.capacity
        for other in reversed(self.groups):
            if other == number:
                break
            divisor = divisor * self.routing.tokens[other]
        return Atom(self.variable, divisor, self.routing.tokens[number])

    def says(self, digit: Atom) -> Part:
        """What a digit of a place says of the assignment that stands there."""
        if digit == self.expert():
            return Looked(self.routing.key, self.routing.num_experts)
        for number in self.groups:
            if digit == self.group(number):
                return self.routing.token_digits[number]
        return Looked(Special("place", (digit.divisor, digit.size)), digit.size)


@dataclass(frozen=True)
class Tensor:
    """A dispatch or combine tensor taken apart."""

    routing: Routing
    weight: Content | None  # of an assignment
    expert: Atom
    place: Part
    rows: tuple[Atom, ...]  # the tensor's own digits of tokens; the routing's token digits in the same order

    def is_row(self, atom: Atom) -> bool:
        """Whether a digit is a token's."""
        return atom in self.rows

    def token(self, atom: Atom) -> Atom:
        """The routing's digit for one of the tensor's."""
        return self.routing.token_digits[self.rows.index(atom)]

    def stands_at(self, atom: Atom, places: Places) -> Atom | None:
        """The digit of the places that this digit is."""
        if atom.variable == self.expert.variable:
            return places.expert(atom.divisor, atom.size)
        if isinstance(self.place, Atom) and atom.variable == self.place.variable:
            return Atom(places.variable, atom.divisor, atom.size)
        number = self.rows.index(atom) if atom in self.rows else -1
        return places.group(number) if number in places.groups else None


def is_whole(value: Value) -> bool:
    """Whether a value is a dispatch or combine tensor: all its terms mark an expert and a place."""
    found = as_terms(value.content)
    return found is not None and all(
        any(isinstance(mark, kind) for mark in marks.factors) for marks in found for kind in (Equals, At)
    )


def take_apart(value: Value, state: Interpretation, node: fx.Node) -> Tensor:
    """A dispatch or combine tensor as its assignments. Refused unless no two of them can stand at one place."""
    found = as_terms(value.content)
    assert found is not None
    expert, place = _axes(found)
    atoms = [atom for group in value.dims for atom in group]
    axes = [expert.variable] + ([place.variable] if isinstance(place, Atom) else [])
    for axis in (expert, place):
        if isinstance(axis, Atom) and _digits(atoms, axis.variable) != radix.merge([axis]):
            raise Refused("only some of the experts or places of a dispatch tensor")
    rows = tuple(atom for atom in atoms if atom.variable not in axes)
    routing, names = _routing(found, expert, place, rows)
    for column in routing.columns:
        if id_range(column.key, state) > routing.num_experts:
            raise Refused("expert ids that may lie outside the experts")
    weights = [_in_names(marks.weight, names, marks.over, routing) for marks in _in_order(found)]
    return Tensor(routing, _weight(weights, routing, node), expert, place, rows)


def check_disjoint(found: Sequence[Marks], dims: Sequence[Group]) -> None:
    """Raises Refused unless no two terms, and no two choices of one term, mark the same place."""
    expert, place = _axes(found)
    axes = [axis.variable for axis in (expert, place) if isinstance(axis, Atom)]
    _routing(found, expert, place, tuple(atom for group in dims for atom in group if atom.variable not in axes))


def _axes(found: Sequence[Marks]) -> tuple[Atom, Part]:
    experts = {mark.atom for marks in found for mark in marks.factors if isinstance(mark, Equals)}
    places = {mark.place for marks in found for mark in marks.factors if isinstance(mark, At)}
    if len(experts) != 1 or len(places) != 1:
        raise Refused("marks of several experts or several places are multiplied")
    (expert,), (place,) = experts, places
    if not isinstance(expert, Atom) or expert.divisor != 1 or not isinstance(expert.size, int):
        raise Refused("marks of one expert only")
    whole = place.divisor == 1 if isinstance(place, Atom) else isinstance(place, Fixed) and place.extent == 1
    if not whole:
        raise Refused("marks of only some of an expert's places")
    return expert, place


def _digits(atoms: Sequence[Atom], variable: Variable) -> Group:
    own = [atom for atom in atoms if atom.variable == variable]
    return radix.merge(sorted(own, key=lambda atom: atom.divisor, reverse=True))


# ---- the assignments


def _in_order(found: Sequence[Marks]) -> list[Marks]:
    """The terms in an order that does not depend on how they were added: by column of the ids, then by their nodes."""

    def order(marks: Marks) -> tuple[Any, ...]:
        keys = [mark.content for mark in marks.factors if isinstance(mark, Equals)]
        elements = [key for key in keys if isinstance(key, Element) and isinstance(key.root, fx.Node)]
        fixed = tuple(part.index for key in elements for part in key.index if isinstance(part, Fixed))
        return (fixed, *(key.root for key in elements))

    return sorted(found, key=order) if len(found) > 1 else list(found)


def _routing(
    found: Sequence[Marks], expert: Atom, place: Part, rows: tuple[Atom, ...]
) -> tuple[Routing, list[tuple[Atom, Atom]]]:
    """The assignments of these terms, and how the tensor's digits of tokens are called in it."""
    ordered = _in_order(found)
    shared = ordered[0].over
    if len(ordered) > 1 and any(marks.over for marks in ordered):
        raise Refused("a sum over choices beside further terms")
    top_k: Size = radix.product(digit.size for digit in shared) if shared else len(ordered)
    draft = Routing((), tuple(atom.size for atom in rows), top_k, expert.size, radix.extent_of(place), frozenset())
    names = list(zip(rows, draft.token_digits, strict=True))
    columns = tuple(_column(marks, expert, place, names, draft) for marks in ordered)
    domains = prove_disjoint(columns, draft)
    return replace(draft, columns=columns, domains=domains), names


def _choice_digits(over: Group, top_k: Size) -> list[tuple[Atom, Atom]]:
    pairs = []
    divisor: Any = top_k
    for digit in over:
        divisor = radix.divide(divisor, digit.size)
        pairs.append((digit, Atom(ASSIGNMENT, divisor, digit.size)))
    return pairs


def _named(content: Content, names: Sequence[tuple[Atom, Atom]]) -> Content:
    return substitution.rename(Value((), content), names).content


def _column(marks: Marks, expert: Atom, place: Part, names: Sequence[tuple[Atom, Atom]], draft: Routing) -> Column:
    pairs = [*names, *_choice_digits(marks.over, draft.top_k)]
    factors = [_named(mark, pairs) for mark in marks.factors]
    keys = [mark.content for mark in factors if isinstance(mark, Equals) and mark.atom == expert]
    ats = [mark.number for mark in factors if isinstance(mark, At) and mark.place == place]
    bounds = [mark for mark in factors if isinstance(mark, Below)]
    if len(keys) != 1 or len(ats) != 1 or len(keys) + len(ats) + len(bounds) != len(factors):
        raise Refused("marks that are not one expert and one place for each assignment")
    (key,), (at,) = keys, ats
    if not isinstance(key, Element) or not isinstance(key.root, fx.Node):
        raise Refused("expert ids that are computed")
    if at.where or at.most is not None:
        raise Refused("places of assignments that are dropped are not masked by the mask of those that are kept")
    bound: Size = radix.extent_of(place)
    for below in bounds:
        if below.number.where or below.number.most is not None or below.number.items != at.items:
            raise Refused("a capacity that is compared with something else than the assignment's own place")
        bound = _least(bound, below.bound - (below.number.constant - at.constant))
    return Column(key, at, bound)


def _least(first: Size, second: Size) -> Size:
    if is_at_least(second, first):
        return first
    if not is_at_least(first, second):
        raise Refused("a capacity of symbolic size that is not the number of places")
    return second


# ---- weights


def _in_names(
    weight: Content | None, names: Sequence[tuple[Atom, Atom]], over: Group, routing: Routing
) -> Content | None:
    if weight is None:
        return None
    named = _named(weight, [*names, *_choice_digits(over, routing.top_k)])
    keys = {column.key for column in routing.columns}
    return _by_key(named, keys, Looked(routing.key, routing.num_experts))


def _by_key(content: Content, keys: set[Element], key: Looked) -> Content:
    """A weight looked up by the ids of one choice, as looked up by the assignment's id."""
    if isinstance(content, Support):
        return replace(content, weight=_by_key(content.weight, keys, key))
    if isinstance(content, Apply):
        return replace(content, args=tuple(_by_key(argument, keys, key) for argument in content.args))
    if isinstance(content, Element):
        index = tuple(key if isinstance(part, Looked) and part.content in keys else part for part in content.index)
        return replace(content, index=index)
    return content


def _weight(weights: Sequence[Content | None], routing: Routing, node: fx.Node) -> Content | None:
    """One weight for all choices: columns of one tensor, or one tensor a choice."""
    present = [weight for weight in weights if weight is not None]
    if not present:
        return None
    supports = {replace(weight, weight=present[0]) for weight in present if isinstance(weight, Support)}
    if len(present) != len(weights) or len(supports) > 1:
        raise Refused("choices of which only some are weighted")
    if supports:
        if not all(isinstance(weight, Support) for weight in present):
            raise Refused("choices of which only some are weighted")
        inner = [weight.weight for weight in present if isinstance(weight, Support)]
        merged = _weight(inner, routing, node)
        assert merged is not None
        return replace(supports.pop(), weight=merged)
    if len(present) == 1:
        return present[0]
    try:
        merged = merge(present, node)
    except Refused:
        raise Refused("the choices' weights are neither columns of one tensor nor one tensor each") from None
    return substitute(merged, expert_atom(len(present)), Atom(ASSIGNMENT, 1, len(present)))
