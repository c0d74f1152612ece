"""Padded slots: what stands for them in dims and contents, and what is known of integers and masks over them.

A dimension of padded slots is an atom of one of two variables, in bins that `bins_of` names:
    "padded"    the slots of the rows of one sorted order; float contents speak of the assignment whose slot it is
    "searched"  slots that have looked up their bin (searchsorted), before any order of rows is involved
Integers and masks over them are Specials:
    "table"     (slots, integer at an assignment's slot, number at slots of none; None if it is the number of some row)
    "position"  (slots,): at an assignment's slot its place in the sorted order, at slots of none the place of some row
    "filled", "unfilled", "binned"   (bins,): slots that hold a row, that hold none, that lie below the last bin's end
and of rows that slots of none write:
    "spare"     (rows, base, node): the rows that `node` put into `base`, and further rows for what slots of none bring
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moecompile.passes import radix
from moecompile.passes.aliases import fake_of
from moecompile.passes.bins import Linear, PerRow, Slot, is_slots, slot_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Passed, Refused, walk
from moecompile.passes.radix import is_at_least
from moecompile.passes.rules_index import rows_index
from moecompile.passes.terms import Atom, Constant, Content, Element, Group, Index, Size, Special, Value, Variable


@dataclass(frozen=True)
class Bins:
    """Bins one after another: where each ends, and how many slots the tensor has."""

    ends: Linear
    capacity: Size


@dataclass(frozen=True)
class Table:
    """An integer at each padded slot; `outside` is None where slots of none hold the number of some row."""

    atom: Atom
    inside: Content
    outside: Size | None

    @property
    def content(self) -> Special:
        """The table as a content."""
        return Special("table", (self.atom, self.inside, self.outside))


def padded_atom(group: Group) -> Atom | None:
    """The atom of a dimension that runs through all padded slots of a sorted order's rows."""
    return group[0] if len(group) == 1 and group[0].variable.kind == "padded" else None


def slots_atom(content: Content, slot: Slot, capacity: Size) -> Atom:
    """The dimension that runs through the slots of an order's rows; `content` is a row's slot."""
    return Atom(Variable("padded", (content, capacity), slot.order.variable.group, slot.key), 1, capacity)


def slot_content(atom: Atom) -> Content:
    """A row's slot, for a dimension of padded slots."""
    content: Content = atom.variable.key[0]
    return content


def bins_of(group: Group) -> Bins | None:
    """The bins whose slots a dimension runs through."""
    if len(group) != 1:
        return None
    (atom,) = group
    if atom.variable.kind == "searched":
        return atom.variable.key if atom.size == atom.variable.key.capacity else None
    if atom.variable.kind != "padded" or atom.size != atom.variable.key[1]:
        return None
    slot = slot_of(slot_content(atom))
    return Bins(slot.ends, atom.size) if slot is not None else None


def kind_of(content: Content) -> str | None:
    """The kind of a Special."""
    return content.kind if isinstance(content, Special) else None


def table_of(value: Value) -> Table | None:
    """The value as a table of padded slots, dimensions of one aside; None if it is something else."""
    if kind_of(value.content) != "table":
        return None
    assert isinstance(value.content, Special)
    table = Table(*value.content.about)
    if [group for group in value.dims if group] != [(table.atom,)]:
        raise Refused("a table of padded slots in another layout")
    return table


def mask_of(state: Interpretation, node: Any) -> tuple[str, Bins] | None:
    """("filled", "unfilled" or "binned", bins) of a mask of padded slots."""
    if not is_tensor(node):
        return None
    value = state.value(node)
    if kind_of(value.content) not in ("filled", "unfilled", "binned"):
        return None
    assert isinstance(value.content, Special)
    bins = value.content.about[0]
    if not any(bins_of(group) == bins or _is_run_of(group, bins) for group in value.dims):
        raise Refused("a mask of padded slots in another order than the slots'")
    return value.content.kind, bins


def _is_run_of(group: Group, bins: Bins) -> bool:
    """Whether a dimension is 0, 1, 2, ..., one number a slot."""
    return (
        len(group) == 1
        and group[0].variable.kind == "free"
        and group[0].divisor == 1
        and group[0].size == bins.capacity
    )


def is_tensor(argument: Any) -> bool:
    """Whether an argument is the node of a tensor."""
    return isinstance(argument, fx.Node) and isinstance(fake_of(argument), torch.Tensor)


def tensor(argument: Any) -> fx.Node:
    """The argument, if it is the node of a tensor."""
    if not is_tensor(argument):
        raise Passed
    node: fx.Node = argument
    return node


def integers(argument: Any) -> fx.Node:
    """The argument, if it is the node of an integer tensor."""
    node = tensor(argument)
    if fake_of(node).dtype in (torch.bool, torch.uint8):
        raise Passed
    return node


# ---- numbers


def number(state: Interpretation, argument: Any) -> Size | float | None:
    """An argument that is one number: of Python, symbolic, or a tensor all of whose elements are the same."""
    if isinstance(argument, (int, float)):
        return argument
    if not isinstance(argument, fx.Node):
        return None
    if isinstance(fake_of(argument), (int, torch.SymInt)):
        return state.number(argument)
    content = state.value(argument).content if is_tensor(argument) else None
    if isinstance(content, Special) and content.kind == "number":
        symbolic: Size = content.about[0]
        return symbolic
    return content.value if isinstance(content, Constant) else None


def whole(state: Interpretation, argument: Any) -> Size:
    """An argument that is one whole number."""
    found = number(state, argument)
    if found is None or isinstance(found, float):
        raise Refused("a table of padded slots with something that is not a whole number")
    return found


# ---- rows that unfilled slots may read


def appended(state: Interpretation, node: fx.Node) -> Value | None:
    """The rows before the appended zeros, or None if nothing was appended, or something was written into it since."""
    return state.appended.get(node) if state.value(node) == state.leaf(node) else None


def reads_zeros(state: Interpretation, node: fx.Node, table: Table) -> bool:
    """Whether unfilled slots of a table read appended zeros."""
    rows, outside = appended(state, node), table.outside
    if rows is None or outside is None:
        return False
    size = state.shape(node)[0]
    if isinstance(outside, int) and outside < 0:
        outside = size + outside
    return is_at_least(outside, radix.group_size(rows.dims[0])) and is_at_least(size, outside + 1)


def check_rows_known(content: Content, atom: Atom) -> None:
    """Raises Refused if a padded tensor's content is told by the slot, and not by the assignment that stands there."""
    for inner in walk(content):
        if isinstance(inner, Element) and any(getattr(part, "variable", None) == atom.variable for part in inner.index):
            raise Refused(f"{inner.root}, a tensor of padded slots of which nothing else is known")


def check_capacity(slot: Slot, capacity: Size) -> None:
    """All bins must fit for every routing, or slots would lie outside the tensor."""
    rows, experts, block = slot.order.size, slot.num_experts, slot.block
    least = max(block, -(-slot.minimum // block) * block) if slot.minimum else block - 1
    if isinstance(rows, int) and isinstance(experts, int) and not slot.minimum:
        needed: Size = (rows + min(experts, rows) * least) // block * block
    else:
        needed = rows + experts * least
    if not is_at_least(capacity, needed):
        raise Refused(f"a tensor of {capacity} rows, where bins of whole blocks of {block} may need {needed}")


def slot_of_searched(order: Atom, bins: Bins) -> tuple[Content, Slot]:
    """A row's slot in bins that were searched, for the rows of a sorted order."""
    ((symbol, _),) = bins.ends.terms
    _, block, minimum = symbol
    at = bins.ends.key
    assert at is not None
    slot = Slot(order, at, bins.ends.num_experts, block, minimum)
    content = PerRow(slot.linear, at)
    return content, slot


def is_run(value: Value) -> bool:
    """Whether the value is 0, 1, 2, ... along its one dimension."""
    content = value.content
    return (
        isinstance(content, Index)
        and len(content.atoms) == 1
        and content.atoms[0].variable.kind == "free"
        and value.dims == (content.atoms,)
    )


def along_rows(call: Call, state: Interpretation) -> Value:
    """The index of a gather or scatter along the first dimension, where it is the same along the others."""
    index = state.value(tensor(call.arguments.get("index", call.arguments.get("indices"))))
    concerned = is_slots(index.content) or kind_of(index.content) in ("table", "position")
    if not concerned or (call["dim"] or 0) not in (0, -len(index.dims)):
        raise Passed
    return rows_index(index, 0)
