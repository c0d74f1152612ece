"""Rules for bins padded to a block: rows put at padded slots, worked on there, and brought back.

rows = zeros(C, H); rows[slot] = x[order // k]     dims ((padded), (h)), content x[j/k, h]: `padded` runs through the
                                                   slots, content speaks of the assignment whose slot it is; what
                                                   stands at slots of none is passes/padding.py's matter
cat([x, zeros(1, H)])[table // k]                  the same
rows[slot]                                         dims of slot, content x[j/k, h]
grouped_mm(rows, w, offs=ends)                     the product that it is for rows in sorted order
zeros(T + 1, H).index_add(0, token, rows)          the sum over each token's choices, and a row for slots of none
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moecompile.passes import radix, rules_bins, rules_padded_sums, rules_slots
from moecompile.passes.aliases import fake_of
from moecompile.passes.bins import at_ids, is_bins, is_slots, is_whole_order, slot_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Passed, Refused, Rule, is_plain
from moecompile.passes.radix import difference
from moecompile.passes.rules_index import check_wrapped, of_rows
from moecompile.passes.slots import (
    Table,
    along_rows,
    appended,
    bins_of,
    check_capacity,
    check_rows_known,
    integers,
    is_tensor,
    kind_of,
    number,
    padded_atom,
    reads_zeros,
    slot_content,
    slot_of_searched,
    slots_atom,
    table_of,
    whole,
)
from moecompile.passes.terms import Atom, Constant, Index, Special, Value
from moecompile.passes.unify import enumerates, look_up, unify

# ---- rows put at slots


def _setitem(call: Call, state: Interpretation) -> Value:
    index = of_rows(call["index"])
    return _put(call, state, state.value(integers(index)), call["value"])


def _index_put(call: Call, state: Interpretation) -> Value | None:
    if len(call["indices"]) != 1:
        raise Passed
    index = state.value(integers(call["indices"][0]))
    if call["accumulate"] is True:
        return rules_padded_sums.added(call, state, index, call["values"])
    return _put(call, state, index, call["values"])


def _index_copy(call: Call, state: Interpretation) -> Value:
    if call["dim"] not in (0, -len(state.shape(call["input"]))):
        raise Passed
    return _put(call, state, state.value(call["index"]), call["source"])


def _scatter(call: Call, state: Interpretation) -> Value:
    source = call.arguments.get("src", call.arguments.get("value"))
    index = along_rows(call, state)
    if call["reduce"] is not None:
        raise Passed
    if isinstance(source, fx.Node) and state.shape(source) != state.shape(call["index"]):
        raise Passed
    return _put(call, state, index, source)


def _put(call: Call, state: Interpretation, index: Value, source: Any) -> Value:
    """target[slot] = source, or target[table] = source."""
    if kind_of(index.content) == "table":
        return rules_padded_sums.put_back(call, state, index, source)
    if not is_slots(index.content):
        raise Passed
    slot, target = slot_of(index.content), call["input"]
    capacity, *rest = state.shape(target)
    if slot is None or len(index.dims) != 1:
        raise Refused("rows put at places that are not the slots of bins rounded up to a block")
    if enumerates(index.dims[0]) != slot.order.variable.group:
        raise Refused("rows put at slots that are not one for each assignment")
    check_capacity(slot, capacity)
    atom = slots_atom(index.content, slot, capacity)
    outside = number(state, target)
    if not is_tensor(source) or isinstance(state.value(source).content, Constant):
        return _marked(state, target, atom, outside, number(state, source))
    rows = state.value(source)
    if len(rows.dims) != len(rest) + 1 or state.shape(source)[1:] != tuple(rest):
        raise Refused("rows put at slots that they do not fill")
    dims, (_, content) = unify([Value((*index.dims, *((),) * len(rest)), index.content), rows])
    if dims[0] != index.dims[0]:
        raise Refused("rows put at other rows' slots")
    rows = Value(dims, content)
    if state.dtype(source) != state.dtype(target):
        raise Refused("rows put into a tensor of another dtype")
    if fake_of(source).dtype.is_floating_point:
        if outside is None and not _is_empty(state, target):
            raise Refused("rows put at padded slots of a tensor that holds something else")
        return Value(((atom,), *rows.dims[1:]), rows.content)
    if not isinstance(rows.content, Index) or rest or outside is None or isinstance(outside, float):
        raise Refused("integers put at padded slots that are not the numbers of rows, or over unknown ones")
    return Value(((atom,),), Table(atom, rows.content, outside).content)


def _is_empty(state: Interpretation, target: fx.Node) -> bool:
    """Whether the target is uninitialised memory."""
    value, made = state.value(target), state.calls.get(target)
    return made is not None and made.name == "empty" and is_plain(value) and value == state.leaf(target)


def _marked(state: Interpretation, target: fx.Node, atom: Atom, outside: Any, inside: Any) -> Value:
    """zeros(C, dtype=bool)[slot] = True: the slots that hold a row."""
    if state.dtype(target) is not torch.bool or len(state.shape(target)) != 1 or outside is None or inside is None:
        raise Refused("a number put at padded slots")
    if bool(outside) == bool(inside):
        raise Refused("a mask of padded slots that is the same everywhere")
    return Value(((atom,),), Special("filled" if inside else "unfilled", (bins_of((atom,)),)))


# ---- rows read at slots, or at what a table says


def _getitem(call: Call, state: Interpretation) -> Value | None:
    source, index = call["input"], call["index"]
    if source in state.results or not is_tensor(source):
        raise Passed
    first, *rest = index if isinstance(index, tuple) and index else [index]
    if isinstance(first, (slice, int)):
        return _part(call, state, first, rest)
    if any(item is not None and item is not Ellipsis and item != slice(None) for item in rest):
        raise Passed
    result = _read(state, source, state.value(integers(first)))
    dims, dim = list(result.dims), len(state.value(first).dims)
    for place, item in enumerate(rest):
        if item is Ellipsis:
            dim = len(dims) - sum(1 for later in rest[place + 1 :] if later is not None)
            continue
        if item is None:
            dims.insert(dim, ())
        dim += 1
    return Value(tuple(dims), result.content)


def _part(call: Call, state: Interpretation, item: Any, rest: list[Any]) -> Value | None:
    """The first rows of a tensor with spare ones, or some of the experts' numbers."""
    value = state.value(call["input"])
    if any(other is not Ellipsis and other != slice(None) for other in rest):
        raise Passed
    if is_bins(value.content):
        found = rules_bins.part(value, item)
        if found is None:
            raise Passed
        return found
    if kind_of(value.content) != "spare" or not isinstance(item, slice):
        raise Passed
    if item.step not in (None, 1) or item.start not in (None, 0):
        raise Refused("rows of tokens together with those of unfilled slots")
    return rules_padded_sums.kept(call, state, value, whole(state, item.stop))


def _read(state: Interpretation, source: fx.Node, index: Value) -> Value:
    """source[index] along the first dimension."""
    value = state.value(source)
    if is_bins(value.content):
        return at_ids(value, index)
    atom = padded_atom(value.dims[0]) if value.dims else None
    if atom is not None and index.content == slot_content(atom):
        table = table_of(value)
        if isinstance(value.content, Special) and table is None:
            raise Refused("a mask of padded slots, read at slots")
        check_rows_known(value.content, atom)
        return Value((*index.dims, *value.dims[1:]), value.content if table is None else table.inside)
    if atom is not None and not isinstance(index.content, Index):
        raise Refused("padded rows read at other slots than they were put at")
    if kind_of(index.content) == "table":
        return _by_table(state, source, index)
    if kind_of(index.content) == "position":
        return _by_position(state, source, value, index)
    if kind_of(value.content) in ("spare", "table", "filled", "unfilled", "binned", "position", "expert"):
        raise Refused("rows or numbers of padded slots, read in a way that detection does not understand")
    raise Passed


def _by_table(state: Interpretation, source: fx.Node, index: Value) -> Value:
    table, rows = table_of(index), appended(state, source)
    assert table is not None
    if len(index.dims) != 1:
        raise Refused("a table of padded slots in another layout")
    value = state.value(source) if rows is None else rows
    inside = radix.group_size(table.inside.atoms) if isinstance(table.inside, Index) else 0
    fits = difference(radix.group_size(value.dims[0]), inside) == 0
    if not fits or (rows is not None and not reads_zeros(state, source, table)):
        raise Refused("unfilled slots read neither a row of tokens nor a row of zeros")
    return look_up(value, [0], [Value(index.dims, table.inside)], 0)


def _by_position(state: Interpretation, source: fx.Node, value: Value, index: Value) -> Value:
    """Rows in a sorted order, read at each slot's place in that order."""
    bins, order = bins_of(index.dims[0]), value.dims[0]
    if bins is None or len(index.dims) != 1 or len(order) != 1 or not is_whole_order(order[0]):
        raise Refused("rows that are not in a sorted order, read at their places in one")
    if order[0].variable.by != bins.ends.key:
        raise Refused("rows sorted by other ids than those that the bins count")
    content, slot = slot_of_searched(order[0], bins)
    check_capacity(slot, bins.capacity)
    atom = slots_atom(content, slot, bins.capacity)
    if isinstance(value.content, Index) and len(value.dims) == 1:
        return Value(((atom,),), Table(atom, value.content, None).content)
    if not fake_of(source).dtype.is_floating_point:
        raise Refused("integers of padded slots that are not the numbers of rows")
    return Value(((atom,), *value.dims[1:]), value.content)


def _index_select(call: Call, state: Interpretation) -> Value:
    if call["dim"] not in (0, -len(state.shape(call["input"]))):
        raise Passed
    return _read(state, call["input"], state.value(call["index"]))


def _embedding(call: Call, state: Interpretation) -> Value:
    if call["max_norm"] is not None or call["scale_grad_by_freq"] or call["sparse"] or call["padding_idx"] is not None:
        raise Passed
    return _read(state, call["weight"], state.value(call["input"]))


def _gather(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    if is_bins(value.content):
        index = state.value(call.arguments.get("index", call.arguments.get("indices")))
        check_wrapped(call, index, radix.group_size(value.dims[0]), state)
        return at_ids(value, index)
    index = along_rows(call, state)
    if state.shape(call.node)[1:] != state.shape(call["input"])[1:]:
        raise Passed
    return _read(state, call["input"], index)


def _cat(call: Call, state: Interpretation) -> Value | None:
    """[rows, zeros]: rows with zeros appended; [zero, ends[:-1]]: where the experts' rows begin."""
    tensors = call["tensors"]
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        raise Passed
    if number(state, tensors[1]) == 0:
        return _append(call, state, tensors[0], call["dim"])
    if number(state, tensors[0]) == 0 and state.shape(tensors[0]) == (1,):
        return rules_bins.begins(call, state, tensors[1])
    raise Passed


def _pad(call: Call, state: Interpretation) -> Value | None:
    """The same by zeros before or after the first dimension."""
    if not isinstance(call["pad"], (list, tuple)):
        raise Passed
    *others, before, after = call["pad"]
    if call["mode"] != "constant" or call["value"] not in (None, 0) or any(others):
        raise Passed
    if len(call["pad"]) != 2 * len(state.shape(call["input"])):
        raise Passed
    if before == 0:
        return _append(call, state, call["input"], 0)
    if (before, after) != (1, 0):
        raise Passed
    return rules_bins.begins(call, state, call["input"])


def _append(call: Call, state: Interpretation, rows: fx.Node, dim: int) -> Value | None:
    """Remember rows with zeros appended; for all who do not read them by a table, they are a leaf."""
    value = state.value(rows)
    if dim not in (0, -len(value.dims)) or not value.dims or state.dtype(rows) != state.dtype(call.node):
        raise Passed
    state.appended[call.node] = value
    return None


RULES: dict[str, Rule] = {
    **rules_slots.RULES,
    "setitem": _setitem,
    "index_put": _index_put,
    "index_copy": _index_copy,
    "scatter": _scatter,
    "getitem": _getitem,
    "narrow": rules_padded_sums.narrow,
    "index_select": _index_select,
    "embedding": _embedding,
    "gather": _gather,
    "take_along_dim": _gather,
    "cat": _cat,
    "pad": _pad,
    "grouped_mm": rules_padded_sums.grouped_mm,
    "grouped_mm_fallback": rules_padded_sums.grouped_mm,
    "index_add": rules_padded_sums.index_add,
    "scatter_add": rules_padded_sums.scatter_add,
}
