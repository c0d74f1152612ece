"""What the capacity form's meanings are, for the oracle: marks, places, and the rows that stand at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import meanings
from meanings import AXES, Oracle, Space, Unknown
from moecompile.passes import capacity, interpret, places, terms
from moecompile.passes.dispatch import Places
from moecompile.passes.routing import ASSIGNMENT, Routing
from moecompile.passes.terms import Atom, Content, Variable

# ---- capacity: marks and numbers (passes/capacity.py, passes/places.py)


def _below(oracle: Oracle, content: capacity.Below, space: Space) -> Tensor:
    return (oracle.content(content.number, space) < oracle.size(content.bound)).double()


def _at(oracle: Oracle, content: capacity.At, space: Space) -> Tensor:
    return (oracle.content(content.number, space) == oracle.part(content.place, space)).double()


def _marks(oracle: Oracle, content: capacity.Marks, space: Space) -> Tensor:
    product: Content = content.weight if content.weight is not None else terms.Constant(1)
    for factor in content.factors:
        product = terms.Apply("mul", (product, factor))
    return oracle.summed(product, content.over, space)


def _sum(oracle: Oracle, content: capacity.Sum, space: Space) -> Tensor:
    total = torch.zeros([1] * AXES, dtype=torch.float64)
    for marks in content.marks:
        total = total + oracle.content(marks, space)
    return total


def _support(oracle: Oracle, content: capacity.Support, space: Space) -> Tensor:
    weight = oracle.content(content.weight, space)
    return (weight > 0 if content.positive else weight != 0).double()


def _number(oracle: Oracle, content: places.Number, space: Space) -> Tensor:
    total = torch.full([1] * AXES, float(content.constant), dtype=torch.float64)
    for item, count in content.items:
        total = total + count * oracle.content(item, space)
    if content.most is not None:
        total = total.clamp(max=oracle.size(content.most))
    holds = torch.ones([1] * AXES, dtype=torch.float64)
    for mark in content.where:
        holds = holds * oracle.content(mark, space)
    return torch.where(holds != 0, total, float(oracle.size(content.otherwise)))


def _running(oracle: Oracle, content: places.Running, space: Space) -> Tensor:
    """The number of assignments up to `at`, itself included, whose key is the expert."""
    at, size = oracle.number(content.at, space), oracle.extent(content.at)
    expert, first = oracle.part(content.expert, space), space.axes
    space, earlier = space.axis(size)
    inner = space.bind(places._EARLIER, 1, size, earlier)
    counted = (oracle.content(content.key, inner) == expert) & (earlier <= at)
    return counted.double().sum(first, keepdim=True)


def _tally(oracle: Oracle, content: places.Tally, space: Space) -> Tensor:
    """The number of assignments that all marks mark for the expert."""
    size = max((_reach(mark) for mark in content.marks), default=0)
    if not size:
        raise Unknown("a tally of nothing")
    expert, first = oracle.part(content.expert, space), space.axes
    experts = next(atom.size for mark in content.marks for atom in _atoms(mark) if atom.variable == places._EXPERT)
    space, counted = space.axis(oracle.size(size))
    inner = space.bind(places._COUNTED, 1, oracle.size(size), counted)
    inner = inner.bind(places._EXPERT, 1, oracle.size(experts), expert)
    product = torch.ones([1] * AXES, dtype=torch.float64)
    for mark in content.marks:
        product = product * oracle.content(mark, inner)
    return product.sum(first, keepdim=True)


def _reach(content: Content) -> Any:
    return max((atom.divisor * atom.size for atom in _atoms(content) if atom.variable == places._COUNTED), default=0)


def _atoms(content: Content) -> list[Atom]:
    found: list[Atom] = []
    for inner in interpret.walk(content):
        if isinstance(inner, terms.Element):
            found += [part for part in inner.index if isinstance(part, Atom)]
        elif isinstance(inner, terms.Equals) and isinstance(inner.atom, Atom):
            found.append(inner.atom)
        elif isinstance(inner, places.Running):
            found += [part for part in (*inner.at, inner.expert) if isinstance(part, Atom)]
        elif isinstance(inner, places.Tally) and isinstance(inner.expert, Atom):
            found.append(inner.expert)
    return found


# ---- capacity: rows in places (passes/dispatch.py)


def assigned(oracle: Oracle, routing: Routing) -> tuple[Tensor, Tensor]:
    """Each assignment's expert, and its place; -1 for both where it is dropped."""
    tokens = torch.Size([oracle.size(size) for size in routing.tokens]).numel()
    choices = oracle.size(routing.top_k)
    ids, at = [], []
    for number, column in enumerate(routing.columns):
        whole = Atom(ASSIGNMENT, 1, tokens * choices)
        expert = oracle.flat(column.key, (whole,), tokens * choices)
        place = oracle.flat(column.place, (whole,), tokens * choices)
        kept = place < oracle.size(column.bound)
        own = slice(None) if len(routing.columns) == 1 else slice(number, None, choices)
        ids.append(torch.where(kept, expert, -1.0)[own])
        at.append(torch.where(kept, place, -1.0)[own])
    return torch.stack(ids, -1).flatten().long(), torch.stack(at, -1).flatten().long()


def _in_places(oracle: Oracle, variable: Variable, number: Tensor, space: Space) -> Space:
    """The assignment that stands at a place, if one does."""
    found = variable.key
    assert isinstance(found, Places)
    routing = found.routing
    expert, place = assigned(oracle, routing)
    size, capacity_of = len(expert), oracle.size(routing.capacity)
    flat = expert * capacity_of + place
    whole, index = Space().axis(size)
    whole = whole.bind(ASSIGNMENT, 1, size, index)
    for group in found.groups:
        digit = oracle.digit(routing.token_digits[group], whole).expand(size, *[1] * (AXES - 1)).flatten()
        flat = flat + digit * oracle.size(found.group(group).divisor)
    stands = torch.full((int(max(number.max(), flat.max())) + 1,), -1)
    kept = expert >= 0
    stands[flat[kept]] = torch.arange(size)[kept]
    at = stands[number]
    defined = at >= 0 if space.defined is None else space.defined & (at >= 0)
    filled = Space(space.digits, space.axes, defined)
    return filled.bind(ASSIGNMENT, 1, size, at.clamp(min=0))


def _ids_of(oracle: Oracle, routing: Routing) -> Tensor:
    return assigned(oracle, routing)[0]


def _is_kept(content: Content) -> Content | None:
    """1 where an assignment was not dropped."""
    if isinstance(content, terms.Element) and isinstance(content.root, Routing):
        return terms.Apply("add", (terms.Constant(1), terms.Apply("clamp", (content,), (None, 0))))
    return None


meanings.CONTENTS.update(
    {
        capacity.Below: _below,
        capacity.At: _at,
        capacity.Marks: _marks,
        capacity.Sum: _sum,
        capacity.Support: _support,
        places.Number: _number,
        places.Running: _running,
        places.Tally: _tally,
    }
)
meanings.DERIVED.update(places=_in_places)
meanings.LEAVES[Routing] = _ids_of
meanings.KEPT.append(_is_kept)
