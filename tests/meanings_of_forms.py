"""What the meanings that only one form has are, for the oracle: capacity's places, padded bins' slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import meanings
from meanings import AXES, Oracle, Space, Unknown
from moecompile.passes import bins, capacity, interpret, places, terms
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
    at, size = torch.zeros([1] * AXES, dtype=torch.long), 1
    for part in content.at:
        extent = oracle.size(part.size if isinstance(part, Atom) else part.extent)
        at, size = at * extent + oracle.part(part, space), size * extent
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


# ---- padded bins: numbers (passes/bins.py)


def _symbol(oracle: Oracle, linear: bins.Linear, symbol: tuple[Any, ...]) -> Tensor:
    """One number an expert."""
    assert linear.key is not None
    name, *about = symbol
    count = meanings.counts(oracle, linear.key, linear.num_experts)
    if name == "one":
        return torch.ones_like(count)
    if name == "count":
        return count.clamp(min=about[0])
    if name == "offset":
        return count.cumsum(0)
    if name == "full":
        return (count / about[0]).floor()
    blocks = (count.clamp(min=about[1]) / about[0]).ceil()
    return blocks if name == "blocks" else blocks.cumsum(0)


def numbers(oracle: Oracle, linear: bins.Linear) -> Tensor:
    """One number an expert, of symbols that are one an expert."""
    total = torch.zeros(oracle.size(linear.num_experts), dtype=torch.float64)
    for symbol, factor in linear.terms:
        if symbol[0] not in ("row", "place", "run"):
            total = total + factor * _symbol(oracle, linear, symbol)
    return total


def _per_expert(oracle: Oracle, content: bins.PerExpert, space: Space) -> Tensor:
    return _along_experts(numbers(oracle, content.linear), space)


def _along_experts(found: Tensor, space: Space) -> Tensor:
    indices = [index for known in space.digits.values() for _, size, index in known if size != 1]
    if len(found) == 1:
        return found.view([1] * AXES)
    if len(indices) != 1 or int(indices[0].max()) != len(found) - 1:
        raise Unknown("numbers that lie otherwise than one an expert")
    return found[indices[0]]


def _per_row(oracle: Oracle, content: bins.PerRow, space: Space) -> Tensor:
    expert = oracle.content(content.at, space).long()
    own = numbers(oracle, content.linear)
    total = own[expert.clamp(0, len(own) - 1)]
    for symbol, factor in content.linear.terms:
        if symbol[0] in ("row", "place"):
            total = total + factor * oracle.digit(symbol[1], space)
    return total


# ---- padded bins: slots (passes/slots.py)


def _in_slots(oracle: Oracle, variable: Variable, number: Tensor, space: Space) -> Space:
    """The assignment whose slot it is, if there is one."""
    content, _ = variable.key
    size = torch.Size([oracle.size(atom.size) for atom in variable.group]).numel()
    slot = oracle.flat(content, variable.group, size).long()
    stands = torch.full((int(max(number.max(), slot.max())) + 1,), -1)
    stands[slot] = torch.arange(size)
    at = stands[number]
    defined = at >= 0 if space.defined is None else space.defined & (at >= 0)
    return oracle.along(variable.group, at.clamp(min=0), size, Space(space.digits, space.axes, defined))


Whole = tuple[Tensor, Tensor | None]


def _table(oracle: Oracle, about: tuple[Any, ...], space: Space, shape: Sequence[int]) -> Whole:
    """An integer at an assignment's slot, a number at others."""
    _, inside, outside = about
    found = oracle.content(inside, space)
    if outside is None or space.defined is None:
        return found, space.defined
    return torch.where(space.defined, found, float(oracle.size(outside))), None


def _slots(oracle: Oracle, found: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of each slot its expert (the number of experts beyond the last), its rank among the expert's, whether filled."""
    slots = torch.arange(oracle.size(found.capacity))
    ends = numbers(oracle, found.ends).long()
    begins = numbers(oracle, bins.before(found.ends)).long()
    counts = numbers(oracle, bins.counts_of(found.ends)).long()
    expert = torch.searchsorted(ends, slots, right=True)
    own = expert.clamp(max=len(ends) - 1)
    rank = slots - begins[own]
    return expert, rank, (expert < len(ends)) & (rank < counts[own])


def _slot_number(space: Space, shape: Sequence[int]) -> Tensor:
    """The axis of the slots: the only one."""
    axes = [number for number, extent in enumerate(shape) if extent != 1]
    if len(axes) != 1:
        raise Unknown("slots in several dimensions")
    view = [1] * AXES
    view[axes[0]] = shape[axes[0]]
    return torch.arange(shape[axes[0]]).view(view)


def _filled(oracle: Oracle, about: tuple[Any, ...], space: Space, shape: Sequence[int]) -> Whole:
    return _slots(oracle, about[0])[2][_slot_number(space, shape)].double(), None


def _unfilled(oracle: Oracle, about: tuple[Any, ...], space: Space, shape: Sequence[int]) -> Whole:
    return 1 - _filled(oracle, about, space, shape)[0], None


def _binned(oracle: Oracle, about: tuple[Any, ...], space: Space, shape: Sequence[int]) -> Whole:
    expert, _, _ = _slots(oracle, about[0])
    return (expert < oracle.size(about[0].ends.num_experts))[_slot_number(space, shape)].double(), None


def _expert(oracle: Oracle, about: tuple[Any, ...], space: Space, shape: Sequence[int]) -> Whole:
    found, clamped = about
    expert = _slots(oracle, found)[0]
    if clamped:
        expert = expert.clamp(max=oracle.size(found.ends.num_experts) - 1)
    return expert[_slot_number(space, shape)].double(), None


def _position(oracle: Oracle, about: tuple[Any, ...], space: Space, shape: Sequence[int]) -> Whole:
    """At an assignment's slot its place in the sorted order."""
    (atom,) = about
    found = atom.variable.key
    if atom.variable.kind != "searched":
        raise Unknown("position")
    expert, rank, filled = _slots(oracle, found)
    first = numbers(oracle, bins.first_rows(found.ends)).long()
    at = _slot_number(space, shape)
    return (first[expert.clamp(max=len(first) - 1)] + rank)[at].double(), filled[at]


def _expert_at(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    """The expert of a slot, inside of another content: only where the slots are an index of the space."""
    found, clamped = about
    atom = Atom(Variable("searched", found), 1, found.capacity)
    expert = _slots(oracle, found)[0][oracle.digit(atom, space)]
    return (expert.clamp(max=oracle.size(found.ends.num_experts) - 1) if clamped else expert).double()


def _spare(oracle: Oracle, about: tuple[Any, ...], space: Space, shape: Sequence[int]) -> Whole:
    """Rows, and further rows of which nothing is said."""
    inner = about[0]
    kept = torch.Size([oracle.size(atom.size) for atom in inner.dims[0]]).numel()
    said, _ = oracle.element(inner, (kept, *shape[1:]))
    found, defined = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    found[:kept], defined[:kept] = said, True
    view = [*shape, *[1] * (AXES - len(shape))]
    return found.view(view), defined.view(view)


def _ratio(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return _along_experts(numbers(oracle, about[0]) / about[1], space)


def _leading(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return _along_experts(numbers(oracle, about[0])[:-1], space)


def _last(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return numbers(oracle, about[0])[-1].view([1] * AXES)


def _of_size(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return torch.full([1] * AXES, float(oracle.size(about[0])), dtype=torch.float64)


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
        bins.PerExpert: _per_expert,
        bins.PerRow: _per_row,
    }
)
meanings.SPECIALS.update(ratio=_ratio, leading=_leading, last=_last, number=_of_size, expert=_expert_at)
meanings.WHOLE.update(
    table=_table, filled=_filled, unfilled=_unfilled, binned=_binned, expert=_expert, position=_position, spare=_spare
)
meanings.DERIVED.update(places=_in_places, padded=_in_slots)
meanings.LEAVES[Routing] = _ids_of
meanings.KEPT = _is_kept
