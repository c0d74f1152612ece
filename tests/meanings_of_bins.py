"""What the padded bins' meanings are, for the oracle: numbers of experts and of rows, and slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import meanings
from meanings import AXES, Oracle, Space, Unknown, along_experts
from moecompile.passes import bins
from moecompile.passes.terms import Atom, Variable

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
    return along_experts(numbers(oracle, content.linear), space)


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
    size = oracle.extent(variable.group)
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
    kept = oracle.extent(inner.dims[0])
    said, _ = oracle.element(inner, (kept, *shape[1:]))
    found, defined = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    found[:kept], defined[:kept] = said, True
    view = [*shape, *[1] * (AXES - len(shape))]
    return found.view(view), defined.view(view)


def _ratio(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return along_experts(numbers(oracle, about[0]) / about[1], space)


def _leading(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return along_experts(numbers(oracle, about[0])[:-1], space)


def _last(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return numbers(oracle, about[0])[-1].view([1] * AXES)


def _of_size(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return torch.full([1] * AXES, float(oracle.size(about[0])), dtype=torch.float64)


meanings.CONTENTS.update({bins.PerExpert: _per_expert, bins.PerRow: _per_row})
meanings.SPECIALS.update(ratio=_ratio, leading=_leading, last=_last, number=_of_size, expert=_expert_at)
meanings.WHOLE.update(
    table=_table, filled=_filled, unfilled=_unfilled, binned=_binned, expert=_expert, position=_position, spare=_spare
)
meanings.DERIVED.update(padded=_in_slots)
