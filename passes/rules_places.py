"""Rules for places of assignments in their experts' bins: compared, one-hot, clamped, chosen by a mask."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.capacity import At, Below, Marks, Sum, as_terms, of_terms, product, simplified
from moecompile.passes.interpret import Interpretation, Passed, Refused, Rule, is_plain
from moecompile.passes.places import Number, number
from moecompile.passes.radix import is_at_least
from moecompile.passes.rules_capacity import check_counts, support, weighted
from moecompile.passes.terms import Atom, Constant, Fixed, Group, Index, Part, Size, Value, Variable
from moecompile.passes.unify import unify


def _compare(call: Call, state: Interpretation) -> Value:
    """place < capacity, place >= 0; combine != 0; place == arange(capacity)."""
    name, first, second = call.name, call["input"], call["other"]
    mirrored = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}
    if not isinstance(first, fx.Node) or not isinstance(fake_of(first), torch.Tensor):
        name, first, second = mirrored[name], second, first
    value = state.value(first)
    if isinstance(value.content, Index) and isinstance(second, fx.Node):
        name, first, second = mirrored[name], second, first
        value = state.value(first) if isinstance(fake_of(first), torch.Tensor) else value
    if isinstance(value.content, (Marks, Sum)) and second == 0 and name in ("ne", "gt"):
        return Value(value.dims, support(value, name == "gt"))
    if not isinstance(value.content, Number):
        raise Passed
    if name == "eq":
        return _at(value, state.value(second))
    bound = _bound(state, second)
    if name in ("lt", "le"):
        return Value(
            value.dims, Marks(frozenset({Below(value.content, _above(bound) if name == "le" else _whole(bound))}))
        )
    if name in ("gt", "ge"):
        return _from_below(value, _above(bound) if name == "gt" else _whole(bound))
    raise Refused(f"places of assignments compared by {name}")


def _bound(state: Interpretation, argument: Any) -> Any:
    """A number that places are compared with; a symbolic one that the graph's guards have settled as what it is."""
    if isinstance(argument, (int, float)):
        if not math.isfinite(argument):
            raise Refused(f"places of assignments compared with {argument}: leave the comparison out")
        return argument
    fake = fake_of(argument) if isinstance(argument, fx.Node) else None
    if isinstance(fake, torch.SymInt) and fake.node.has_hint() and statically_known_true(fake == fake.node.hint):
        return int(fake.node.hint)
    return state.number(argument)


def _whole(bound: Any) -> Size:
    return math.ceil(bound) if isinstance(bound, float) else bound


def _above(bound: Any) -> Size:
    """The first whole number above."""
    return math.floor(bound) + 1 if isinstance(bound, float) else bound + 1


def _from_below(value: Value, bound: Size) -> Value:
    """place >= 0 where places of assignments that are not marked are -1."""
    content = value.content
    assert isinstance(content, Number)
    least = content.least()
    if not content.where or least is None or content.most is not None:
        raise Refused("places of assignments compared from below")
    if not is_at_least(least, bound) or not is_at_least(bound - 1, content.otherwise):
        raise Refused("places of assignments compared from below")
    return Value(value.dims, Marks(content.where))


def _at(value: Value, other: Value) -> Value:
    """place == arange(capacity)."""
    assert isinstance(value.content, Number)
    if not isinstance(other.content, Index):
        raise Refused("places of assignments compared with something else than all places")
    dims, contents = unify([value, other])
    index, found = contents[1], contents[0]
    if (
        not isinstance(index, Index)
        or len(index.atoms) > 1
        or any(atom.variable.kind != "free" for atom in index.atoms)
    ):
        raise Refused("places of assignments compared with something else than all places")
    assert isinstance(found, Number)
    place: Part = index.atoms[0] if index.atoms else Fixed(0, 1)
    return Value(dims, Marks(simplified(frozenset({At(found, place)}))))


def _one_hot(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    if not isinstance(value.content, Number):
        raise Passed
    classes = _bound(state, call["num_classes"])
    if isinstance(classes, int) and classes < 1:
        raise Refused("one_hot of as many places as there happen to be")
    place: Part = Fixed(0, 1) if classes == 1 else Atom(Variable("free", (call.node, "place")), 1, classes)
    group: Group = (place,) if isinstance(place, Atom) else ()
    return Value((*value.dims, group), Marks(simplified(frozenset({At(value.content, place)}))))


def _clamp(call: Call, state: Interpretation) -> Value:
    """place.clamp(max=capacity - 1)."""
    value = state.value(call["input"])
    content = value.content
    if not isinstance(content, Number):
        raise Passed
    most, low = call.arguments.get("max"), call.arguments.get("min")
    least = content.least()
    if low is not None:
        low = _whole(_bound(state, low))
        if least is None or not is_at_least(least, low) or (content.where and not is_at_least(content.otherwise, low)):
            raise Refused("places of assignments clamped from below")
    if most is None:
        return value
    if content.most is not None or isinstance(most, float):
        raise Refused("places of assignments clamped twice, or by a fraction")
    most, otherwise = _bound(state, most), content.otherwise
    if content.where and not is_at_least(most, otherwise):
        if not is_at_least(otherwise, most):
            raise Refused("places of assignments clamped by something that is no number")
        otherwise = most
    return Value(value.dims, replace(content, most=most, otherwise=otherwise))


def _where(call: Call, state: Interpretation) -> Value:
    """where(mask, place, a number); where(mask, weight, 0)."""
    if call["input"] is None:
        raise Passed
    condition = state.value(call["condition"])
    if not isinstance(condition.content, Marks) or not condition.content.is_mask:
        raise Passed
    kept = state.value(call["input"])
    if isinstance(kept.content, Number):
        check_counts(state, call.node)
        dims, contents = unify([condition, kept])
        mask, found = contents
        assert isinstance(mask, Marks) and isinstance(found, Number)
        if found.where and not found.where <= mask.factors:
            raise Refused("places of assignments where something else stands for others")
        outside = _number_of(state, call["other"])
        return Value(dims, number(dict(found.items), found.constant, mask.factors, outside, found.most))
    other = state.value(call["other"])
    if other.content != Constant(0) or not (is_plain(kept) or as_terms(kept.content)):
        raise Passed
    dims, contents = unify([condition, kept])
    mask, found = contents
    assert isinstance(mask, Marks)
    return Value(dims, of_terms([product(term, mask) for term in weighted(call, state, found, call["input"])]))


def _number_of(state: Interpretation, argument: Any) -> Size:
    """A whole number, or a tensor that holds nothing else."""
    if isinstance(argument, fx.Node) and isinstance(fake_of(argument), torch.Tensor):
        content = state.value(argument).content
        argument = content.value if isinstance(content, Constant) else None
    number = _bound(state, argument)
    if isinstance(number, float):
        raise Refused(f"{number} stands for the places of assignments that are dropped")
    return number


RULES: dict[str, Rule] = {
    **{name: _compare for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "one_hot": _one_hot,
    "clamp": _clamp,
    "clamp_max": _clamp,
    "where": _where,
}
