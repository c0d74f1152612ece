"""Rules for the routing layout: sorts, counts, offsets, and the arithmetic on assignment numbers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx

from moecompile.passes import radix, terms
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Refused, Rule, Sparse
from moecompile.passes.rules_views import holds_integers
from moecompile.passes.spelling import not_understood
from moecompile.passes.terms import (
    Atom,
    Constant,
    Content,
    Count,
    Element,
    Equals,
    Group,
    Index,
    Offsets,
    Size,
    Special,
    Value,
    Variable,
)
from moecompile.passes.unify import enumerates, per_expert, rows_covered, run_once_through


def _sort(call: Call, state: Interpretation) -> tuple[Value | None, ...] | None:
    """sort of a one-dimensional key.

    Its values in a new order, and the assignment each row came from. Any order within equal keys is fine.
    """
    key = state.value(call["input"])
    if len(key.dims) != 1 or not key.dims[0]:
        return None
    group = key.dims[0]
    if isinstance(key.content, Index):
        return _sorted_permutation(key, call)
    if call["descending"]:
        raise Refused("a descending sort")
    if any(atom.variable.rank >= 3 for atom in group):
        raise Refused("a sort of rows that are already in an order of their own")
    if not isinstance(key.content, Element):
        return None
    if fake_of(call["input"]).dtype.is_floating_point:
        return None
    order = Atom(Variable("order", call.node, group, key.content), 1, radix.group_size(group))
    return Value(((order,),), key.content), Value(((order,),), Index(group))


def _sorted_permutation(key: Value, call: Call) -> tuple[Value | None, ...]:
    """Sorting a permutation gives 0, 1, 2, ... and, as indices, the inverse permutation."""
    assert isinstance(key.content, Index)
    if call["descending"] or enumerates(key.dims[0]) != key.content.atoms:
        raise Refused("a sort of assignment numbers that are not a permutation")
    return Value((key.content.atoms,), key.content), Value((key.content.atoms,), Index(key.dims[0]))


def _argsort(call: Call, state: Interpretation) -> Value | None:
    outcome = _sort(call, state)
    return outcome[1] if outcome is not None else None


# ---- arithmetic on indices


def _floor_divide(call: Call, state: Interpretation) -> Value | None:
    parts = _digits(call, state)
    return None if parts is None else Value(parts[0].dims, Index(parts[1]))


def _remainder(call: Call, state: Interpretation) -> Value | None:
    parts = _digits(call, state)
    return None if parts is None else Value(parts[0].dims, Index(parts[2]))


def _digits(call: Call, state: Interpretation) -> tuple[Value, Group, Group] | None:
    """An index by a whole number: its value, and the digits above and below."""
    if call.arguments.get("rounding_mode", "floor") not in ("floor", "trunc"):
        return None
    value = state.value(call["input"])
    if not isinstance(value.content, Index) or isinstance(call["input"], int):
        return None
    number = state.number(call["other"])
    if isinstance(number, int) and number < 1:
        raise Refused(f"assignment numbers divided by {number}")
    groups = radix.regroup(
        value.content.atoms, (radix.divide(radix.group_size(value.content.atoms), number) or 0, number)
    )
    if groups is None:
        raise Refused(f"assignment numbers divided by {number}, which is not a digit of theirs")
    return value, groups[0], groups[1]


def _div(call: Call, state: Interpretation) -> Value | None:
    if call["rounding_mode"] in ("floor", "trunc"):
        return _floor_divide(call, state)
    from moecompile.passes.rules_arithmetic import elementwise

    if call["rounding_mode"] is not None:
        return None
    return elementwise(call, state)


# ---- counts and offsets


def counted(state: Interpretation, key: Value, num_experts: Size, node: fx.Node) -> Value:
    """How many assignments each expert has; `key` must run over all assignments once."""
    covered = isinstance(key.content, Element) and all(rows_covered(group) for group in key.dims)
    if not covered or not run_once_through(key.dims, key.content):
        raise Refused("counts of something that is not all of the expert ids")
    _check_exact(state, node)
    total = radix.product(radix.group_size(group) for group in key.dims)
    if state.dtype(node) is torch.float32 and isinstance(total, int) and total > 1 << 24:
        raise Refused(f"counts of {total} assignments in float32, which rounds them")
    atom = Atom(Variable("free", (node, "expert")), 1, num_experts)
    return Value((() if num_experts == 1 else (atom,),), Count(key.content, num_experts))


def _check_exact(state: Interpretation, node: fx.Node) -> None:
    if not holds_integers(state.dtype(node)):
        raise Refused(f"counts in {state.dtype(node)}, which rounds them")


def _histc(call: Call, state: Interpretation) -> Value | None:
    """histc(ids, bins=E, min=0, max=E-1) (or max=E with bins=E): one bin an expert."""
    bins, low, high = call["bins"], call["min"], call["max"]
    if not isinstance(bins, int) or low != 0 or high not in (bins - 1, bins) or (bins == 1):
        raise Refused(f"a histogram of {bins} bins from {low} to {high}, which is not one bin an expert")
    ids = state.value(call["input"])
    _check_known(ids.content, bins, state)
    return counted(state, ids, bins, call.node)


def _check_known(ids: Content, num_experts: Size, state: Interpretation) -> None:
    """Raises Refused unless all ids are known to name an expert: what counts by comparing leaves the others out."""
    known = known_range(ids, state)
    if known is None or not isinstance(num_experts, int) or known > num_experts:
        raise Refused("counts that leave out ids which name no expert, as these may")


def _bincount(call: Call, state: Interpretation) -> Value | None:
    if call["weights"] is not None or not isinstance(call["minlength"], int) or call["minlength"] < 1:
        return None
    ids = state.value(call["input"])
    known = known_range(ids.content, state)
    if (known or 0) > call["minlength"] or (call["minlength"] == 1 and known is None):  # one count fits any shape
        raise Refused(f"counts of {call['minlength']} experts or more, as ids may name others")
    return counted(state, ids, call["minlength"], call.node)


def _searchsorted(call: Call, state: Interpretation) -> Value | None:
    """searchsorted(sorted ids, arange(E), right=True): where each expert's rows end."""
    rows, experts = state.value(call["sorted_sequence"]), state.value(call["input"])
    order = rows.dims[0][0] if len(rows.dims) == 1 and len(rows.dims[0]) == 1 else None
    right = call["right"] is True or call["side"] == "right"
    if (
        order is None
        or order.variable.kind != "order"
        or call["sorter"] is not None
        or not isinstance(experts.content, Index)
    ):
        return None
    if not right or order.variable.by != rows.content or experts.dims != (experts.content.atoms,):
        raise Refused("searchsorted that does not give the end of each expert's rows")
    if not isinstance(rows.content, Element) or not rows_covered(rows.dims[0]):
        raise Refused("offsets of something that is not all of the expert ids")
    if known_range(rows.content, state) is None:
        raise Refused("searchsorted counts ids below 0, which these may be, to the first expert")
    return Value(experts.dims, Offsets(rows.content, radix.group_size(experts.content.atoms)))


def _cumsum(call: Call, state: Interpretation) -> Value | None:
    value = state.value(call["input"])
    if isinstance(value.content, Count) and per_expert(value):
        _check_exact(state, call.node)
        return Value(value.dims, Offsets(value.content.key, value.content.num_experts))
    return None


def summed_counts(call: Call, value: Value, dims: list[int], state: Interpretation) -> Value | None:
    """A one-hot mask summed over all assignments, or marks of distinct experts summed over tokens: counts."""
    content = value.content
    if isinstance(content, Equals) and isinstance(content.atom, Atom):
        rest = [group for number, group in enumerate(value.dims) if number not in dims]
        if rest == [(content.atom,)]:
            if not _is_one_hot(call["input"], state):  # which raises for ids that name no expert
                _check_known(content.content, content.atom.size, state)
            key = Value(tuple(value.dims[number] for number in dims), content.content)
            return counted(state, key, content.atom.size, call.node)
    if isinstance(content, Special) and content.kind == "chosen":
        ids, atom = content.about
        if lie_as_made(value) and dims == [0]:
            if not distinct(ids, state):
                raise Refused("marks of experts count a token once where it may name an expert twice")
            return counted(state, ids, atom.size, call.node)
    return None


def lie_as_made(marks: Value) -> bool:
    """Whether marks of chosen experts still are (tokens, experts), each token's in its own row."""
    assert isinstance(marks.content, Special)
    ids, atom = marks.content.about
    return marks.dims == (ids.dims[0], (atom,))


def _is_one_hot(node: fx.Node, state: Interpretation) -> bool:
    """Whether a mask was made by one_hot, casts and views aside."""
    call = state.calls.get(node)
    while call is not None and call.name in ("cast", "view", "permute", "transpose"):
        call = state.calls.get(call["input"])
    return call is not None and call.name == "one_hot"


def scattered_counts(call: Call, state: Interpretation) -> Value | None:
    """zeros(E).scatter_add(0, ids, ones): counts."""
    added = call["src"] if "src" in call.arguments else call["source"]
    target, index, source = state.value(call["input"]), state.value(call["index"]), state.value(added)
    if target.content != Constant(0) or source.content != Constant(1) or len(target.dims) != 1 or len(index.dims) != 1:
        return None
    if call.arguments.get("alpha", 1) != 1:
        return None
    if not isinstance(index.content, Element) or state.shape(call["index"]) != state.shape(added):
        return None
    return counted(state, index, state.shape(call["input"])[0], call.node)


def distinct(ids: Value, state: Interpretation) -> bool:
    """Whether no token can name one expert twice.

    The ids are one a token, or its choices lie within the dimension along which a topk or sort chose them.
    """
    if len(ids.dims) < 2 or radix.group_size(ids.dims[-1]) == 1:
        return True
    content = ids.content
    if not isinstance(content, Element) or content.written is not None or content.root not in state.distinct:
        return False
    assert isinstance(content.root, fx.Node)
    leaf = state.leaf(content.root)
    choices = state.shape(content.root)[-1]
    return (content == leaf.content and bool(leaf.dims[-1])) and all(
        atom.variable == leaf.dims[-1][0].variable and radix.divide(choices, atom.divisor * atom.size) is not None
        for atom in ids.dims[-1]
    )


def note_ids(call: Call, state: Interpretation) -> None:
    """Remember what is known of ids that are chosen here: their range, and whether they differ along a dimension."""
    node = call.node
    fake = fake_of(node)
    if not isinstance(fake, torch.Tensor) or fake.is_floating_point() or fake.dtype not in _IDS or call.inplace:
        return
    if node in state.touched:
        return
    chosen = _chosen_by(call, state)
    if chosen is not None:
        dim = chosen["dim"]
        source = state.shape(chosen["input"])
        if isinstance(dim, int) and source and isinstance(source[dim], int):
            state.id_ranges[node] = int(source[dim])
            if chosen.name in ("topk", "sort", "argsort") and dim in (-1, len(source) - 1):
                state.distinct.add(node)
        return
    if call.name in ("contiguous", "clone", "getitem") and isinstance(call["input"], fx.Node):
        _note_part(call, state)


_IDS = (torch.int32, torch.int64)


def _chosen_by(call: Call, state: Interpretation) -> Call | None:
    """The topk, sort, max, argmax or argsort whose indices this is."""
    if call.name in ("argmax", "argsort"):
        return call
    second = (call.name == "getitem" and call["index"] == 1) or (call.name == "getattr" and call["name"] == "indices")
    inner = state.calls.get(call["input"]) if second and isinstance(call["input"], fx.Node) else None
    return inner if inner is not None and inner.name in ("topk", "sort", "max") else None


def _note_part(call: Call, state: Interpretation) -> None:
    """A copy of ids, or a cut of them that takes no single index of the last dimension, is known like the ids."""
    source = call["input"]
    value = state.values.get(source)
    content = value.content if value is not None else None
    if value is None or not isinstance(content, Element) or content.written is not None or value != state.leaf(source):
        return
    if content.root is not source or source not in state.id_ranges:
        return
    items = call["index"] if call.name == "getitem" else ()
    items = items if isinstance(items, tuple) else (items,)
    if not all(item is Ellipsis or isinstance(item, (slice, int)) for item in items):
        return
    state.id_ranges[call.node] = state.id_ranges[source]
    if source in state.distinct and len(state.shape(call.node)) == len(state.shape(source)):
        state.distinct.add(call.node)


def known_range(ids: Content, state: Interpretation) -> int | None:
    """How many experts the ids can name; None if some may name none."""
    if isinstance(ids, Element) and ids.written is None and isinstance(ids.root, fx.Node):
        return state.id_ranges.get(ids.root)
    return None


def id_range(ids: Content, state: Interpretation) -> int:
    """How many experts the ids can name.

    The size of the dimension they were chosen along, or what is known of ids put together. Raises Refused if that is
    not known.
    """
    known = known_range(ids, state)
    if known is not None:
        return known
    raise Refused("a loop over experts whose ids may lie outside the experts it runs")


def _within(call: Call, state: Interpretation, experts: int) -> Value:
    """The result as a leaf of ids, each of which names one of `experts` experts."""
    state.id_ranges[call.node] = experts
    return state.leaf(call.node)


def joined_ids(call: Call, state: Interpretation) -> Value | None:
    """cat or stack of ids that were chosen one after the other: in the largest of their ranges."""
    tensors = call["tensors"]
    if not isinstance(tensors, (list, tuple)) or not tensors or state.dtype(call.node).is_floating_point:
        return None
    with contextlib.suppress(Refused):
        return _within(call, state, max(id_range(state.value(part).content, state) for part in tensors))
    return None


def filled_ids(call: Call, state: Interpretation) -> Value | None:
    """ids.masked_fill(mask, e): in the range of the ids and e, less the last expert where the mask is `ids == last`."""
    number = call["value"]
    if call.inplace or type(number) is not int or number < 0 or state.dtype(call.node).is_floating_point:
        return None
    value = state.value(call["input"])
    with contextlib.suppress(Refused):
        experts = id_range(value.content, state)
        last = Equals(value.content, terms.Fixed(experts - 1, experts))
        kept = experts - 1 if state.value(call["mask"]) == Value(value.dims, last) else experts
        return _within(call, state, max(kept, number + 1))
    return None


def _stack(call: Call, state: Interpretation) -> Value:
    """Stacked ids; nothing else that is stacked is understood."""
    found = joined_ids(call, state)
    if found is None:
        raise Refused(not_understood(call.node))
    return found


def compare(call: Call, state: Interpretation) -> Value | None:
    """ids == e, or ids.unsqueeze(-1) == arange(E): a one-hot mask."""
    value = state.value(call["input"])
    other: Any = call["other"]
    if isinstance(other, bool) or not isinstance(value.content, Element):
        return None
    if isinstance(other, int):
        return Value(value.dims, Equals(value.content, terms.Fixed(other, id_range(value.content, state))))
    second = state.value(other)
    if (
        isinstance(second.content, Index)
        and len(second.content.atoms) == 1
        and second.content.atoms[0].variable.kind == "free"
    ):
        from moecompile.passes.unify import unify

        dims, contents = unify([value, second])
        # along a dimension of the ids themselves, each is compared with its own number alone
        if isinstance(contents[1], Index) and [atom.variable.kind for atom in contents[1].atoms] == ["free"]:
            return Value(dims, Equals(contents[0], contents[1].atoms[0]))
    return None


def _beyond(call: Call, state: Interpretation) -> Value | None:
    """ids >= E, ids < E: known where all ids are below E. Code for expert parallelism marks foreign assignments so."""
    value, bound = state.value(call["input"]), call["other"]
    if isinstance(value.content, Element) and isinstance(bound, int) and bound >= id_range(value.content, state):
        return Value(value.dims, Constant(call.name == "lt"))
    return None


def unclamped(call: Call, state: Interpretation) -> Value | None:
    """ids.clamp(0, E - 1): the ids where all are in that range anyway; else ids that are. None for anything else."""
    value, low, high = state.value(call["input"]), call["min"], call["max"]
    known = known_range(value.content, state)
    if known is None and type(low) is int and type(high) is int and 0 <= low <= high and not call.inplace:
        return _within(call, state, high + 1)
    if known is None or not (low is None or (isinstance(low, int) and low <= 0)):
        return None
    return value if high is None or (isinstance(high, int) and high >= known - 1) else None


RULES: dict[str, Rule] = {
    "ge": _beyond,
    "lt": _beyond,
    "sort": _sort,
    "argsort": _argsort,
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "div": _div,
    "histc": _histc,
    "bincount": _bincount,
    "cumsum": _cumsum,
    "searchsorted": _searchsorted,
    "eq": compare,
    "stack": _stack,
}

__all__ = [
    "RULES",
    "Content",
    "Sparse",
    "compare",
    "counted",
    "distinct",
    "filled_ids",
    "joined_ids",
    "scattered_counts",
    "summed_counts",
]
