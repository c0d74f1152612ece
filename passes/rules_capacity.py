"""Rules of the capacity form: arithmetic on one-hot masks, on the places counted by them, and on tensors made of both.

Each rule is exact for every routing, or passes the operation on to the general rules. The meanings are those of
passes/capacity.py and passes/places.py. What products of dispatch and combine tensors with rows are:
passes/rules_dispatch.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from moecompile.passes import terms
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.capacity import (
    At,
    Marks,
    Sum,
    Support,
    as_terms,
    of_terms,
    over_choices,
    own_expert,
    product,
    scaled,
    simplified,
)
from moecompile.passes.dispatch import check_disjoint
from moecompile.passes.interpret import Interpretation, Passed, Refused, Rule
from moecompile.passes.places import Number, Tally, number, running, tally, tally_of_count
from moecompile.passes.rules_views import holds_integers, sliced
from moecompile.passes.terms import Apply, Atom, Constant, Content, Count, Element, Equals, Group, Index, Meaning, Value
from moecompile.passes.unify import unify
from moecompile.runtime.elementwise import dtype_name


def _operands(state: Interpretation, *arguments: Any) -> list[Value]:
    """The meanings of operands, at least one of which must be of this form."""
    for argument in arguments:
        if isinstance(argument, fx.Node) and not isinstance(fake_of(argument), torch.Tensor):
            raise Passed
    values = [state.value(argument) for argument in arguments]
    if not any(isinstance(value.content, (Number, Marks, Sum)) for value in values):
        raise Passed
    return [_counts(value) for value in values]


def _counts(value: Value) -> Value:
    """Counts by expert as a tally: the one dimension that is not of size one is the expert's."""
    groups = [group for group in value.dims if group]
    if not isinstance(value.content, Count) or len(groups) != 1 or len(groups[0]) != 1:
        return value
    expert = groups[0][0]
    if expert.variable.kind != "free" or expert.divisor != 1 or expert.size != value.content.num_experts:
        return value
    return Value(value.dims, tally_of_count(value.content, expert))


def check_counts(state: Interpretation, node: fx.Node) -> None:
    """Raises Refused unless the result holds whole numbers exactly."""
    if not holds_integers(state.dtype(node)):
        raise Refused(f"places of assignments in {state.dtype(node)}, which rounds them")


# ---- products


def _mul(call: Call, state: Interpretation) -> Value:
    """mask * mask, place * mask, weight * mask."""
    arguments = [call["input"], call["other"]]
    values = _operands(state, *arguments)
    dims, contents = unify(values)
    numbers = [content for content in contents if isinstance(content, Number)]
    if numbers:
        check_counts(state, call.node)
        other = contents[1] if contents[0] is numbers[0] else contents[0]
        return Value(dims, scaled(numbers[0], other))
    sides = [weighted(call, state, content, argument) for content, argument in zip(contents, arguments, strict=True)]
    return Value(dims, of_terms([product(first, second) for first in sides[0] for second in sides[1]]))


def weighted(call: Call, state: Interpretation, content: Content, argument: Any) -> tuple[Marks, ...]:
    """An operand of a product as marks, a weight as marks of everything; in the dtype of the product."""
    found = as_terms(content)
    if found is None:
        if isinstance(content, (Meaning, Index, Count, terms.Offsets, terms.Special, terms.Total)):
            raise Refused("marks of assignments multiplied by something else than a mask or a weight")
        found = (Marks(frozenset(), content),)
    if not isinstance(argument, fx.Node) or state.dtype(argument) == state.dtype(call.node):
        return found
    return tuple(
        marks if marks.weight is None else replace(marks, weight=_cast_weight(marks.weight, state.dtype(call.node)))
        for marks in found
    )


def in_dtype(content: Content, dtype: torch.dtype) -> Content:
    """Marks of assignments in another dtype: marks are 0 and 1 in all of them, weights are converted."""
    marks = as_terms(content)
    if marks is None:
        raise Refused(f"places of assignments as {dtype}")
    if all(term.weight is None for term in marks):
        return content
    return of_terms(
        [term if term.weight is None else replace(term, weight=_cast_weight(term.weight, dtype)) for term in marks]
    )


def _cast_weight(weight: Content, dtype: torch.dtype) -> Content:
    name = dtype_name(dtype)
    if not dtype.is_floating_point:
        raise Refused(f"weights of assignments as {name}")
    return replace(weight, dtype=name) if isinstance(weight, Support) else Apply("cast", (weight,), (name,))


def _and(call: Call, state: Interpretation) -> Value:
    """mask & mask."""
    dims, contents = unify(_operands(state, call["input"], call["other"]))
    factors: frozenset[Content] = frozenset()
    for content in contents:
        marks = as_terms(content)
        if marks is None or len(marks) != 1 or not marks[0].is_mask:
            raise Refused("a mask of assignments and something that is no such mask")
        factors |= marks[0].factors
    return Value(dims, Marks(simplified(factors)))


# ---- sums and differences


def _add(call: Call, state: Interpretation) -> Value:
    return _added(call, state, call["input"], call["other"], 1)


def _sub(call: Call, state: Interpretation) -> Value:
    return _added(call, state, call["input"], call["other"], -1)


def _rsub(call: Call, state: Interpretation) -> Value:
    return _added(call, state, call["other"], call["input"], -1)


def _added(call: Call, state: Interpretation, first: Any, second: Any, sign: int) -> Value:
    """Numbers added or subtracted; terms of a dispatch or combine tensor added."""
    values = _operands(state, first, second)
    if call["alpha"] != 1:
        raise Refused("an addition with alpha")
    dims, contents = unify(values)
    if any(isinstance(content, Number) for content in contents):
        check_counts(state, call.node)
        a, b = (_as_number(content) for content in contents)
        return Value(dims, _sum_of_numbers(a, b if sign == 1 else scaled(b, Constant(-1))))
    if sign != 1:
        raise Refused("a difference of masks of assignments")
    found: list[Marks] = []
    for content, argument in zip(contents, (first, second), strict=True):
        if content != Constant(0):
            if as_terms(content) is None:
                raise Refused("marks of assignments are added to something else")
            found += weighted(call, state, content, argument)
    if state.dtype(call.node) is torch.bool and len(found) > 1:  # True + True is True, not 2
        check_disjoint(found, dims)
    return Value(dims, of_terms(found))


def _as_number(content: Content) -> Number:
    if isinstance(content, Number):
        return content
    if (
        isinstance(content, Constant)
        and isinstance(content.value, (int, float))
        and content.value == int(content.value)
    ):
        return number({}, int(content.value))
    marks = as_terms(content)
    if marks is not None and len(marks) == 1 and marks[0].is_mask:
        return number({marks[0]: 1})
    raise Refused("places of assignments are added to something that is no number of assignments")


def _sum_of_numbers(a: Number, b: Number) -> Number:
    if a.where != b.where:
        a, b = _as_plain_number(a), _as_plain_number(b)
    if a.where != b.where and not a.where:
        a, b = b, a
    if a.where != b.where and (b.where or b.items):
        raise Refused("places of assignments that are masked differently are added")
    if a.most is not None or b.most is not None:
        raise Refused("clamped places are added")
    items: Counter[Content] = Counter()
    for content, count in (*a.items, *b.items):
        items[content] += count
    outside = b.otherwise if b.where else b.constant
    return number(items, a.constant + b.constant, a.where, a.otherwise + outside)


def _as_plain_number(value: Number) -> Number:
    """A number that is one constant where marked and another elsewhere, without the condition."""
    if not value.where or value.items:
        return value
    constant = value.constant if value.most is None else min(value.constant, value.most)
    return number({Marks(value.where): constant - value.otherwise}, value.otherwise)


def _cumsum(call: Call, state: Interpretation) -> Value:
    """An inclusive cumsum of a one-hot mask over assignments.

    Each one's place in its expert's room, counted from one.
    """
    value = state.value(call["input"])
    marks = as_terms(value.content)
    if marks is None or isinstance(value.content, terms.Special) or _is_of_one_expert(value.content):
        raise Passed
    order = value.dims[_dim(call["dim"], value)]
    if len(marks) != 1 or not marks[0].is_mask or len(marks[0].factors) != 1:
        raise Refused("a running sum over something else than a one-hot mask of expert ids")
    (mark,) = marks[0].factors
    if not isinstance(mark, Equals) or not isinstance(mark.atom, Atom):
        raise Refused("a running sum over something else than a one-hot mask of expert ids")
    if not order:  # one assignment: its own place is the first
        check_counts(state, call.node)
        return Value(value.dims, number({marks[0]: 1}))
    if any(atom.variable.kind != "ids" for atom in order):
        raise Refused("a running sum that does not run over assignments")
    check_counts(state, call.node)
    return Value(value.dims, running(mark.content, order, mark.atom))


def _is_of_one_expert(content: Content) -> bool:
    """ids == 3, as loops over experts write it."""
    return isinstance(content, Equals) and not isinstance(content.atom, Atom)


def _dim(dim: Any, value: Value) -> int:
    if not isinstance(dim, int) or not value.dims:
        raise Refused(f"a sum over dimension {dim!r}")
    return dim % len(value.dims)


def _sum(call: Call, state: Interpretation) -> Value | None:
    """Sums over experts read an assignment's own.

    Sums of a mask over assignments count; sums over choices stay sums.
    """
    value = state.value(call["input"])
    content = value.content
    if not isinstance(content, (Number, Marks, Sum, Equals)) or _is_of_one_expert(content):
        raise Passed
    dims = call["dim"] if isinstance(call["dim"], (tuple, list)) else [call["dim"]]
    if any(dim is None for dim in dims):
        return None
    if isinstance(content, Sum):
        raise Refused("a sum over a sum of marks")
    if call["dtype"] is not None and call["dtype"] != state.dtype(call["input"]) and isinstance(content, Marks):
        raise Refused("marks of assignments summed in another dtype")
    places = sorted(_dim(dim, value) for dim in dims)
    if isinstance(content, Equals) and not call["keepdim"] and len(value.dims) == len(places) + 1:
        raise Passed  # the experts' counts, or what the general rules make of it
    over: Group = tuple(atom for place in places for atom in value.dims[place])
    result = _summed(
        content if isinstance(content, (Number, Marks)) else Marks(frozenset({content})), over, call, state
    )
    if result is None:
        return None
    kept: list[Group] = []
    for place, group in enumerate(value.dims):
        if place not in places:
            kept.append(group)
        elif call["keepdim"]:
            kept.append(())
    return Value(tuple(kept), result)


def _summed(content: Number | Marks, over: Group, call: Call, state: Interpretation) -> Content | None:
    marks = content.where if isinstance(content, Number) else content.factors
    experts = [mark.atom for mark in marks if isinstance(mark, Equals) and mark.atom in over]
    if isinstance(content, Number):
        if len(over) != 1 or over != tuple(experts):
            raise Refused("a sum of places over something else than experts")
        check_counts(state, call.node)
        return own_expert(content, over[0])
    if len(over) == 1 and over == tuple(experts):
        if not content.is_mask:
            return None
        rest = own_expert(content, over[0])
        return rest if isinstance(rest, Marks) and rest.factors else None
    if any(atom.variable.kind != "ids" for atom in over) or not over:
        return None
    if any(isinstance(mark, At) for mark in marks):
        return over_choices(content, over, call.node)
    if not content.is_mask:
        return None
    check_counts(state, call.node)
    expert = next((mark.atom for mark in marks if isinstance(mark, Equals)), None)
    if not isinstance(expert, Atom):
        raise Refused("a sum over assignments of a mask that marks no experts")
    return tally(content.factors, over, expert)


def support(value: Value, positive: bool) -> Content:
    """Where a combine tensor is not 0.

    Its marks, each where its own weight is not 0, as no two of them mark the same place.
    """
    marks = as_terms(value.content)
    assert marks is not None
    if len(marks) > 1 or marks[0].over:
        check_disjoint(marks, value.dims)
    return of_terms([replace(term, weight=_support(term.weight, positive)) for term in marks])


def _support(weight: Content | None, positive: bool) -> Content | None:
    if weight is None:
        return None
    return replace(weight, dtype=None) if isinstance(weight, Support) else Support(weight, positive)


def _cast(call: Call, state: Interpretation) -> Value | None:
    value, content = state.value(call["input"]), None
    content = value.content
    before, after = state.dtype(call["input"]), state.dtype(call.node)
    if not isinstance(content, (Number, Marks, Sum)) or fake_of(call.node).device != fake_of(call["input"]).device:
        raise Passed
    if before == after:
        return value
    if isinstance(content, Number):
        if not holds_integers(before) or not holds_integers(after):
            raise Refused(f"places of assignments as {after}")
        return value
    if after is torch.bool:
        return Value(value.dims, support(value, positive=False))
    return Value(value.dims, in_dtype(content, after))


def _getitem(call: Call, state: Interpretation) -> Value:
    """one_hot(place, capacity + 1)[..., :capacity] where the capacity is symbolic."""
    source, index = call["input"], call["index"]
    value = state.values.get(source)
    if value is None or not isinstance(value.content, (Number, Marks, Sum)):
        raise Passed
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (item is None or item is Ellipsis or isinstance(item, slice)) for item in items):
        raise Passed
    if items.count(Ellipsis) > 1:
        raise Passed
    if Ellipsis in items:
        place = items.index(Ellipsis)
        items[place : place + 1] = [slice(None)] * (len(value.dims) + 1 + items.count(None) - len(items))
    for dim, item in enumerate(items):
        if item is None:
            value = Value((*value.dims[:dim], (), *value.dims[dim:]), value.content)
        elif item != slice(None):
            start = item.start or 0
            if item.step not in (None, 1) or not isinstance(start, int) or start < 0:
                raise Refused("places of assignments cut in steps, or from the end")
            value = sliced(value, dim, start, state.shape(call.node)[dim], 1, (call.node, dim))
    return value


RULES: dict[str, Rule] = {
    "getitem": _getitem,
    "mul": _mul,
    "logical_and": _and,
    "bitwise_and": _and,
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "cumsum": _cumsum,
    "sum": _sum,
    "cast": _cast,
}

__all__ = ["RULES", "Element", "Tally"]
