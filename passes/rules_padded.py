"""Rules for bins padded to a block: rows put at padded slots, worked on there, and brought back.

rows = zeros(C, H); rows[slot] = x[order // k]       dims ((padded), (h)), content x[j/k, h]: `padded` runs through the slots, content speaks of
                                                     the assignment whose slot it is; what stands at slots of none is passes/padding.py's matter
table = full(C, total); table[slot] = order          "table": j at an assignment's slot, the number `total` at slots of none
table < total,  table == total                       "filled", "unfilled"
cat([x, zeros(1, H)])                                "appended": x, and rows of zeros after it
cat([x, zeros(1, H)])[table // k]                    dims ((padded), (h)), content x[j/k, h]
rows[slot]                                           dims of slot, content x[j/k, h]
zeros(T + 1, H).index_add(0, token, rows)            "spare": the sum over each token's choices, and further rows for what slots of none add
"""

from __future__ import annotations

from typing import Any

from torch import fx

from moecompile.passes import rules_bins, terms
from moecompile.passes.bins import Slot, at_ids, ends_of, is_bins, is_slots, slot_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Combine, Interpretation, Passed, Refused, Rule, fake_of, is_plain
from moecompile.passes.rules_index import rows_index
from moecompile.passes.rules_products import einsum
from moecompile.passes.rules_views import constant, free
from moecompile.passes.terms import (
    Atom,
    Constant,
    Content,
    Group,
    Index,
    Looked,
    Offsets,
    Size,
    Special,
    Total,
    Value,
    Variable,
)
from moecompile.passes.unify import look_up, without


def padded_atom(group: Group) -> Atom | None:
    """The atom of a dimension that runs through padded slots."""
    return group[0] if len(group) == 1 and group[0].variable.kind == "padded" else None


def table_of(value: Value) -> tuple[Atom, Content, Size] | None:
    """(padded slots, integer at an assignment's slot, integer at the others) of a table."""
    content = value.content
    if not isinstance(content, Special) or content.kind != "table":
        return None
    atom, inside, outside = content.about
    if [group for group in value.dims if group] != [(atom,)]:
        raise Refused("a table of padded slots in another layout")
    return atom, inside, outside


def _table(atom: Atom, inside: Content, outside: Size) -> Special:
    return Special("table", (atom, inside, outside))


def difference(first: Size, second: Size) -> int | None:
    """first - second, where that is a number."""
    if isinstance(first, int) and isinstance(second, int):
        return first - second
    import sympy

    result = sympy.expand(sympy.sympify(first) - sympy.sympify(second))
    return int(result) if result.is_number else None


def at_least(first: Size, second: Size) -> bool:
    """Whether first >= second for certain."""
    found = difference(first, second)
    return found is not None and found >= 0


def number(state: Interpretation, argument: Any) -> Size | float | None:
    """An argument that is one number: of Python, symbolic, or a tensor all of whose elements are the same."""
    if isinstance(argument, (int, float)):
        return argument
    if not isinstance(argument, fx.Node):
        return None
    if not hasattr(fake_of(argument), "shape"):
        return state.number(argument)
    content = state.value(argument).content
    if isinstance(content, Special) and content.kind == "number":
        return content.about[0]
    return content.value if isinstance(content, Constant) else None


def _whole(state: Interpretation, argument: Any) -> Size:
    found = number(state, argument)
    if found is None or isinstance(found, float):
        raise Refused("a table of padded slots with something that is not a whole number")
    return found


def _full(call: Call, state: Interpretation) -> Value:
    """full(size, symbolic number), for integers."""
    if not isinstance(call["fill_value"], fx.Node) or fake_of(call.node).dtype.is_floating_point:
        raise Passed
    found = number(state, call["fill_value"])
    if found is None:
        raise Passed
    return constant(Special("number", (found,)), state.shape(call.node), call.node)


# ---- rows put at slots


def _setitem(call: Call, state: Interpretation) -> Value:
    index = call["index"]
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    return _put(call, state, state.value(_index(index)), call["value"])


def _index_put(call: Call, state: Interpretation) -> Value:
    if len(call["indices"]) != 1:
        raise Passed
    index = state.value(_index(call["indices"][0]))
    if call["accumulate"] is True:
        return _added(call, state, index, call["values"])
    return _put(call, state, index, call["values"])


def _index_copy(call: Call, state: Interpretation) -> Value:
    if call["dim"] not in (0, -len(state.shape(call["input"]))):
        raise Passed
    return _put(call, state, state.value(call["index"]), call["source"])


def _scatter(call: Call, state: Interpretation) -> Value:
    source = call.arguments.get("src", call.arguments.get("value"))
    index = _first_dimension(call, state)
    if call["reduce"] is not None:
        raise Passed
    if isinstance(source, fx.Node) and state.shape(source) != state.shape(call["index"]):
        raise Passed
    return _put(call, state, index, source)


def _first_dimension(call: Call, state: Interpretation) -> Value:
    """The index of a gather or scatter along the first dimension, where it is the same along the others."""
    index = state.value(_tensor(call.arguments.get("index", call.arguments.get("indices"))))
    concerned = is_slots(index.content) or (isinstance(index.content, Special) and index.content.kind == "table")
    if not concerned or (call["dim"] or 0) not in (0, -len(index.dims)):
        raise Passed
    return rows_index(index, 0)


def _tensor(argument: Any) -> fx.Node:
    if not isinstance(argument, fx.Node) or not hasattr(fake_of(argument), "dtype"):
        raise Passed
    return argument


def _index(argument: Any) -> fx.Node:
    node = _tensor(argument)
    if str(fake_of(node).dtype) in ("torch.bool", "torch.uint8"):
        raise Passed
    return node


def _put(call: Call, state: Interpretation, index: Value, source: Any) -> Value:
    """target[slot] = source, or target[table] = source."""
    if isinstance(index.content, Special) and index.content.kind == "table":
        return _put_back(call, state, index, source)
    if not is_slots(index.content):
        raise Passed
    slot = slot_of(index.content)
    if slot is None:
        raise Refused("rows put at places that are not the slots of bins rounded up to a block")
    target = call["input"]
    capacity, *rest = state.shape(target)
    if len(index.dims) != 1:
        raise Refused("rows put at slots along several dimensions")
    _check_capacity(slot, capacity)
    atom = Atom(Variable("padded", index.content, slot.order.variable.group, slot.key), 1, capacity)
    outside = number(state, target)
    if not isinstance(source, fx.Node) or isinstance(state.value(source).content, Constant):
        return _filled(state, target, atom, outside, number(state, source))
    rows = state.value(source)
    if rows.dims[:1] != index.dims or state.shape(source)[1:] != tuple(rest):
        raise Refused("rows put at other rows' slots")
    if state.dtype(source) != state.dtype(target):
        raise Refused("rows put into a tensor of another dtype")
    if fake_of(source).dtype.is_floating_point:
        if outside is None and not _is_empty(state, target):
            raise Refused("rows put at padded slots of a tensor that holds something else")
        return Value(((atom,), *rows.dims[1:]), rows.content)
    if not isinstance(rows.content, Index) or rest or outside is None or isinstance(outside, float):
        raise Refused("integers put at padded slots that are not the numbers of rows, or over unknown ones")
    return Value(((atom,),), _table(atom, rows.content, outside))


def _is_empty(state: Interpretation, target: fx.Node) -> bool:
    value = state.value(target)
    made = state.calls.get(target)
    return made is not None and made.name == "empty" and is_plain(value) and value == state.leaf(target)


def _filled(state: Interpretation, target: fx.Node, atom: Atom, outside: Any, inside: Any) -> Value:
    """zeros(C, dtype=bool)[slot] = True: the slots that hold a row."""
    if str(state.dtype(target)) != "torch.bool" or len(state.shape(target)) != 1 or outside is None or inside is None:
        raise Refused("a number put at padded slots")
    if bool(outside) == bool(inside):
        raise Refused("a mask of padded slots that is the same everywhere")
    return Value(((atom,),), Special("filled" if inside else "unfilled", (atom,)))


def _check_capacity(slot: Slot, capacity: Size) -> None:
    """All bins must fit for every routing, or slots would lie outside the tensor."""
    rows, experts, block = slot.order.size, slot.num_experts, slot.block
    least = max(block, -(-slot.minimum // block) * block) if slot.minimum else block - 1
    if isinstance(rows, int) and isinstance(experts, int) and not slot.minimum:
        needed: Size = (rows + min(experts, rows) * least) // block * block
    else:
        needed = rows + experts * least
    if not at_least(capacity, needed):
        raise Refused(f"a tensor of {capacity} rows, where bins of whole blocks of {block} may need {needed}")


def _put_back(call: Call, state: Interpretation, index: Value, source: Any) -> Value:
    """target[table] = rows: each padded row at its assignment's number, the others beyond the last."""
    found = table_of(index)
    rows = state.value(source) if isinstance(source, fx.Node) else Value((), Constant(0))
    if found is None or not rows.dims or rows.dims[0] != (found[0],) or index.dims != ((found[0],),):
        raise Refused("padded rows put back at the numbers of other rows")
    atom, inside, outside = found
    if not isinstance(inside, Index) or inside.atoms != atom.variable.group:
        raise Refused("padded rows put back at numbers that are not one for each assignment")
    if state.dtype(source) != state.dtype(call["input"]):
        raise Refused("rows put into a tensor of another dtype")
    return _with_spare(call, state, Value((inside.atoms, *rows.dims[1:]), rows.content), outside)


def _with_spare(call: Call, state: Interpretation, value: Value, outside: Size) -> Value:
    """The value's rows, and further rows of the tensor at which the rows of unfilled slots end up."""
    made = state.calls.get(call["input"])
    rows, kept = state.shape(call["input"])[0], terms.group_size(value.dims[0])
    if made is None or made.name != "zeros" or number(state, call["input"]) != 0:
        raise Refused("padded rows collected in a tensor that is not new and zero")
    if not at_least(outside, kept) or not at_least(rows, kept):
        raise Refused("the rows of unfilled slots end up among those of tokens")
    dims = (free(rows, (call.node, "spare")), *value.dims[1:])
    return Value(dims, Special("spare", (value, call["input"] if call.inplace else None, call.node)))


# ---- rows read at slots, or at what a table says


def _getitem(call: Call, state: Interpretation) -> Value | None:
    source, index = call["input"], call["index"]
    if source in state.results or not isinstance(source, fx.Node) or isinstance(fake_of(source), (tuple, list)):
        raise Passed
    items = list(index) if isinstance(index, tuple) else [index]
    first, *rest = items or [None]
    if isinstance(first, slice):
        return _leading(call, state, first, rest)
    if not isinstance(first, fx.Node) or any(
        item is not None and item != slice(None) and item is not Ellipsis for item in rest
    ):
        raise Passed
    result = _looked_up(state, source, _index(first))
    dims = list(result.dims)
    dim = len(state.value(first).dims)
    for item in rest:
        if item is Ellipsis:
            dim = len(dims) - sum(1 for later in rest[rest.index(item) + 1 :] if later is not None)
        elif item is None:
            dims.insert(dim, ())
            dim += 1
        else:
            dim += 1
    return Value(tuple(dims), result.content)


def _leading(call: Call, state: Interpretation, item: slice, rest: list[Any]) -> Value | None:
    """The first rows of a tensor with spare ones, or the experts' numbers but the last."""
    value = state.value(call["input"])
    spare = isinstance(value.content, Special) and value.content.kind == "spare"
    if not (spare or is_bins(value.content)) or any(other != slice(None) and other is not Ellipsis for other in rest):
        raise Passed
    if item.step not in (None, 1) or (item.start is not None and item.start != 0):
        raise Passed
    if not spare:
        found = rules_bins.leading(value, item.stop)
        return found if found is not None else _passed()
    return _kept(call, state, value, _whole(state, item.stop))


def _narrow(call: Call, state: Interpretation) -> Value | None:
    value = state.value(call["input"])
    if (
        not isinstance(value.content, Special)
        or value.content.kind != "spare"
        or call["dim"] not in (0, -len(value.dims))
    ):
        raise Passed
    if call["start"] != 0:
        raise Refused("rows of tokens together with those of unfilled slots")
    return _kept(call, state, value, state.number(call["length"]))


def _passed() -> None:
    raise Passed


def _kept(call: Call, state: Interpretation, value: Value, stop: Size) -> Value | None:
    """The rows without the spare ones. Nobody else may see the tensor that has them, as this one takes its place."""
    assert isinstance(value.content, Special)
    inner, base, node = value.content.about
    kept = terms.group_size(inner.dims[0])
    if isinstance(stop, int) and stop < 0:
        stop = state.shape(call["input"])[0] + stop
    if difference(stop, kept) != 0:
        raise Refused("rows of tokens together with those of unfilled slots, or not all rows of tokens")
    names = [node] if base is None else [node, base]
    users = {user for name in names for user in name.users if hasattr(fake_of(user), "dtype")}
    if users - {node, call.node}:
        raise Refused(f"{node}, which has rows for unfilled slots, is used in several places")
    if isinstance(inner.content, Total):
        state.combines.append(Combine(call.node, inner))
        return None
    return inner


def _looked_up(state: Interpretation, source: fx.Node, index_node: fx.Node, index: Value | None = None) -> Value:
    """source[index] along the first dimension."""
    value = state.value(source)
    index = index if index is not None else state.value(index_node)
    if is_bins(value.content):
        return at_ids(value, index)
    atom = padded_atom(value.dims[0]) if value.dims else None
    if atom is not None and index.content == atom.variable.key:
        content = value.content
        if isinstance(content, Special):
            if content.kind != "table":
                raise Refused("a mask of padded slots, read at slots")
            content = content.about[1]
        return Value((*index.dims, *value.dims[1:]), content)
    if atom is not None and not isinstance(index.content, Index):
        raise Refused("padded rows read at other slots than they were put at")
    if isinstance(index.content, Special) and index.content.kind == "table":
        return _by_table(state, value, index)
    if isinstance(value.content, Special) and value.content.kind in ("appended", "spare", "table", "filled", "unfilled"):
        raise Refused("rows of padded slots, or with zeros appended, read at something that detection does not understand")
    raise Passed


def _by_table(state: Interpretation, value: Value, index: Value) -> Value:
    found = table_of(index)
    assert found is not None
    atom, inside, _ = found
    rows = appended(value)
    if rows is not None and not reads_zeros(state, value, index):
        raise Refused("unfilled slots read neither a row of tokens nor a row of zeros")
    if len(index.dims) != 1:
        raise Refused("a table of padded slots in another layout")
    return look_up(rows if rows is not None else value, [0], [Value(index.dims, inside)], 0)


def appended(value: Value) -> Value | None:
    """The rows before the appended zeros, or None if nothing was appended."""
    content = value.content
    if not isinstance(content, Special) or content.kind != "appended":
        return None
    atom, rows = content.about
    if value.dims != ((atom,), *rows.dims[1:]):
        raise Refused("rows with zeros appended, in another layout")
    return rows


def reads_zeros(state: Interpretation, value: Value, index: Value) -> bool:
    """Whether unfilled slots of a table read appended zeros."""
    rows, found = appended(value), table_of(index)
    if rows is None or found is None:
        return False
    outside, size = found[2], terms.group_size(value.dims[0])
    if isinstance(outside, int) and outside < 0:
        outside = size + outside
    return at_least(outside, terms.group_size(rows.dims[0])) and at_least(size, outside + 1)


def _index_select(call: Call, state: Interpretation) -> Value:
    if call["dim"] not in (0, -len(state.shape(call["input"]))):
        raise Passed
    return _looked_up(state, call["input"], call["index"])


def _embedding(call: Call, state: Interpretation) -> Value:
    if call["max_norm"] is not None or call["scale_grad_by_freq"] or call["sparse"] or call["padding_idx"] is not None:
        raise Passed
    return _looked_up(state, call["weight"], call["input"])


def _gather(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    if is_bins(value.content):
        return at_ids(value, state.value(call.arguments.get("index", call.arguments.get("indices"))))
    index = _first_dimension(call, state)
    if state.shape(call.node)[1:] != state.shape(call["input"])[1:]:
        raise Passed
    return _looked_up(state, call["input"], call.arguments.get("index", call.arguments.get("indices")), index)


def _cat(call: Call, state: Interpretation) -> Value:
    """[rows, zeros]: rows with zeros appended; [zero, ends[:-1]]: where the experts' rows begin."""
    tensors = call["tensors"]
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        raise Passed
    found = rules_bins.begins(call, state)
    if found is not None:
        return found
    rows, zeros = (state.value(tensor) for tensor in tensors)
    if call["dim"] not in (0, -len(rows.dims)) or number(state, tensors[1]) != 0 or not rows.dims:
        raise Passed
    if len({state.dtype(tensor) for tensor in (*tensors, call.node)}) != 1:
        raise Passed
    size = state.shape(call.node)[0]
    atom = Atom(Variable("free", (call.node, "appended")), 1, size)
    return Value(((atom,), *rows.dims[1:]), Special("appended", (atom, rows)))


# ---- arithmetic on tables, and masks


def _floor_divide(call: Call, state: Interpretation) -> Value:
    table = _table_operand(call, state)
    if table is None or call.arguments.get("rounding_mode", "floor") != "floor":
        return _bins_rule(call, state)
    return _digit(call, state, table, 0)


def _remainder(call: Call, state: Interpretation) -> Value:
    table = _table_operand(call, state)
    return _digit(call, state, table, 1) if table is not None else _bins_rule(call, state)


def _table_operand(call: Call, state: Interpretation) -> tuple[Atom, Content, Size] | None:
    return table_of(state.value(call["input"])) if isinstance(call["input"], fx.Node) else None


def _bins_rule(call: Call, state: Interpretation) -> Any:
    return rules_bins.RULES[call.name](call, state)


def _digit(call: Call, state: Interpretation, table: tuple[Atom, Content, Size], place: int) -> Value:
    """table // k (place 0) or table % k (place 1)."""
    atom, inside, outside = table
    divisor = state.number(call["other"])
    if not isinstance(inside, Index) or not isinstance(divisor, int) or divisor < 1:
        raise Refused("a table of padded slots divided by something that is not a number")
    high = terms.divide(terms.group_size(inside.atoms), divisor)
    groups = terms.regroup(inside.atoms, (high, divisor)) if high is not None else None
    if groups is None:
        raise Refused(f"assignment numbers divided by {divisor}, which is not a digit of theirs")
    if isinstance(outside, int):
        rest: Size | None = divmod(outside, divisor)[place]
    else:
        rest = (
            terms.divide(outside, divisor)
            if place == 0
            else (0 if terms.divide(outside, divisor) is not None else None)
        )
    if rest is None:
        raise Refused("a table of padded slots whose number for unfilled ones does not divide")
    return Value(state.value(call["input"]).dims, _table(atom, Index(groups[place]), rest))


def _compare(call: Call, state: Interpretation) -> Value:
    """table < total, table == total, table >= 0, ...: which slots hold a row."""
    table = _table_operand(call, state)
    if table is None:
        raise Passed
    atom, inside, outside = table
    bound = _whole(state, call["other"])
    if not isinstance(inside, Index):
        raise Refused("a comparison of padded slots")
    above = _relation(call.name, outside, outside, bound)
    within = _relation(call.name, 0, terms.group_size(inside.atoms) - 1, bound)
    if above is None or within is None or above == within:
        raise Refused("a comparison that does not tell filled slots from unfilled ones")
    return Value(state.value(call["input"]).dims, Special("filled" if within else "unfilled", (atom,)))


def _relation(name: str, low: Size, high: Size, bound: Size) -> bool | None:
    """Whether all numbers from low to high are in the relation to the bound (True), none is (False), or it is not known (None)."""
    if name in ("ge", "lt"):
        yes, no = at_least(low, bound), at_least(bound, high + 1)
    elif name in ("gt", "le"):
        yes, no = at_least(low, bound + 1), at_least(bound, high)
    else:
        yes, no = low == high and difference(low, bound) == 0, at_least(low, bound + 1) or at_least(bound, high + 1)
    if not (yes or no):
        return None
    return yes if name in ("ge", "gt", "eq") else no


def _invert(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    opposite = {"filled": "unfilled", "unfilled": "filled"}
    if not isinstance(value.content, Special) or value.content.kind not in opposite:
        raise Passed
    if str(state.dtype(call["input"])) != "torch.bool":
        raise Refused("the bits of a mask inverted")
    return Value(value.dims, Special(opposite[value.content.kind], value.content.about))


def mask_of(state: Interpretation, node: Any) -> tuple[bool, Atom] | None:
    """(whether the mask is true at filled slots, padded slots) of a mask of slots."""
    if not isinstance(node, fx.Node) or not hasattr(fake_of(node), "dtype"):
        return None
    content = state.value(node).content
    if not isinstance(content, Special) or content.kind not in ("filled", "unfilled"):
        return None
    return content.kind == "filled", content.about[0]


def _where(call: Call, state: Interpretation) -> Value:
    found = mask_of(state, call["condition"])
    if found is None or call["input"] is None:
        raise Passed
    kept, other = (call["input"], call["other"]) if found[0] else (call["other"], call["input"])
    return _masked(call, state, kept, call["condition"], other)


def _masked_fill(call: Call, state: Interpretation) -> Value:
    found = mask_of(state, call["mask"])
    if found is None:
        raise Passed
    if found[0]:
        raise Refused("rows of assignments overwritten by a number")
    return _masked(call, state, call["input"], call["mask"], call["value"])


def _masked(call: Call, state: Interpretation, kept: Any, mask: fx.Node, other: Any) -> Value:
    """kept at filled slots, other at unfilled ones."""
    found = mask_of(state, mask)
    assert found is not None
    kept = _tensor(kept)
    value, atom = state.value(kept), found[1]
    dims = state.value(mask).dims
    aligned = ((),) * (len(value.dims) - len(dims)) + dims
    if len(aligned) != len(value.dims) or [
        (own, group) for own, group in zip(value.dims, aligned, strict=True) if group
    ] != [((atom,), (atom,))]:
        raise Refused("a mask of padded slots on rows that are not at these slots")
    if state.shape(call.node) != state.shape(kept) or state.dtype(call.node) != state.dtype(kept):
        raise Refused("a mask of padded slots that changes the rows' shape or dtype")
    table = table_of(value)
    if table is not None:
        return Value(value.dims, _table(atom, table[1], _whole(state, other)))
    if number(state, other) is None:
        raise Refused("unfilled slots that are given something else than a number")
    return value


# ---- products and sums


def _grouped_mm(call: Call, state: Interpretation) -> Value | None:
    """Rows at padded slots times their expert's matrix, by the ends of the padded bins."""
    rows, ends = state.value(call["input"]), state.value(_tensor(call["offs"]))
    weight_node = call.arguments.get("mat2", call.arguments.get("weight"))
    atom = padded_atom(rows.dims[0]) if rows.dims else None
    if atom is None:
        if is_bins(ends.content) and not isinstance(ends.content, Offsets):
            raise Refused("a grouped GEMM with the ends of padded bins, over rows that are not at padded slots")
        raise Passed
    slot = slot_of(atom.variable.key)
    weights = state.value(weight_node)
    if call.arguments.get("bias") is not None or slot is None or len(rows.dims) != 2 or len(weights.dims) != 3:
        raise Refused("a grouped GEMM of padded rows that is not rows by stacked weights")
    if ends_of(ends) != slot.ends:
        raise Refused("a grouped GEMM whose offsets are not the ends of the bins that its rows were put into")
    if len({state.dtype(node) for node in (call["input"], weight_node, call.node)}) != 1:
        raise Refused("a product of mixed dtypes")
    if terms.group_size(weights.dims[0]) != slot.num_experts or len(weights.dims[0]) > 1:
        raise Refused(f"a grouped GEMM of {terms.group_size(weights.dims[0])} experts with {slot.num_experts} bins")
    content = weights.content
    if weights.dims[0]:
        content = terms.substitute(content, weights.dims[0][0], Looked(slot.key, slot.num_experts))
    return einsum(state, call.node, rows, Value(weights.dims[1:], content), "sf,fn->sn")


def _index_add(call: Call, state: Interpretation) -> Value | None:
    if call["alpha"] != 1 or call["dim"] not in (0, -2):
        raise Passed
    return _added(call, state, state.value(call["index"]), call["source"])


def _scatter_add(call: Call, state: Interpretation) -> Value | None:
    index = _first_dimension(call, state)
    if state.shape(call["index"]) != state.shape(call["src"]):
        raise Passed
    return _added(call, state, index, call["src"])


def _added(call: Call, state: Interpretation, index: Value, source: fx.Node) -> Value | None:
    """base[token of slot] += row: a sum over each token's choices."""
    found = table_of(index)
    rows = state.value(source)
    if found is None:
        raise Passed
    atom, token, outside = found
    if len(rows.dims) != 2 or rows.dims[0] != (atom,) or index.dims != ((atom,),):
        raise Refused("rows added at the tokens of other slots")
    over = without(atom.variable.group, token.atoms) if isinstance(token, Index) else None
    if over is None or state.dtype(source) != state.dtype(call.node):
        raise Refused("padded rows added at an index that is not their token's number, or in another dtype")
    total = Total(rows.content, over, state.dtype(source))
    value = Value((token.atoms, rows.dims[1]), total)
    kept, base = terms.group_size(token.atoms), state.value(call["input"])
    if difference(state.shape(call["input"])[0], kept) == 0 and at_least(kept, outside + 1) and at_least(outside, 0):
        state.combines.append(Combine(call.node, value, call["input"], base.content == Constant(0)))
        return None
    return _with_spare(call, state, value, outside)


RULES: dict[str, Rule] = {
    **rules_bins.RULES,
    "full": _full,
    "full_like": _full,
    "new_full": _full,
    "setitem": _setitem,
    "index_put": _index_put,
    "index_copy": _index_copy,
    "scatter": _scatter,
    "getitem": _getitem,
    "narrow": _narrow,
    "index_select": _index_select,
    "embedding": _embedding,
    "gather": _gather,
    "take_along_dim": _gather,
    "cat": _cat,
    "floor_divide": _floor_divide,
    "div": _floor_divide,
    "remainder": _remainder,
    **{name: _compare for name in ("eq", "ne", "lt", "gt", "le", "ge")},
    "invert": _invert,
    "where": _where,
    "masked_fill": _masked_fill,
    "grouped_mm": _grouped_mm,
    "grouped_mm_fallback": _grouped_mm,
    "index_add": _index_add,
    "scatter_add": _scatter_add,
}
