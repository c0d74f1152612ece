"""Rules for indexing: rows looked up by routing, permutations and their inverses, and what is written through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moecompile.passes import radix, substitution, terms
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Refused, Rule, is_plain
from moecompile.passes.rules_loop import assigned_rows, rows_of_one
from moecompile.passes.rules_routing import known_range
from moecompile.passes.rules_views import free, holds_integers, selected, sliced
from moecompile.passes.terms import Atom, Constant, Equals, Group, Index, Size, Special, Value, Variable
from moecompile.passes.unify import enumerates, look_up, unify


def _getitem(call: Call, state: Interpretation) -> Value | None:
    source, index = call["input"], call["index"]
    if source in state.results and isinstance(index, int):
        pieces = state.results[source]
        return pieces[index] if -len(pieces) <= index < len(pieces) else None
    if isinstance(fake_of(source), (tuple, list)):
        return None
    return indexed(state, source, index, call.node)


def indexed(state: Interpretation, source: fx.Node, index: Any, key: fx.Node) -> Value | None:
    """source[index] by Python's rules: integers, slices, None, Ellipsis, tensors, and tuples of them."""
    value = state.value(source)
    items = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(1 for item in items if item is not None and item is not Ellipsis)
    if Ellipsis in [item for item in items if not isinstance(item, fx.Node)]:
        position = next(number for number, item in enumerate(items) if item is Ellipsis)
        items[position : position + 1] = [slice(None)] * (len(value.dims) - consumed)
    lookups: list[tuple[int, Value]] = []
    dim = 0
    for number, item in enumerate(items):
        if item is None:
            value = Value((*value.dims[:dim], (), *value.dims[dim:]), value.content)
            lookups = [(at, found) for at, found in lookups]
            dim += 1
        elif isinstance(item, slice):
            value = _slice(state, value, dim, item, (key, number))
            dim += 1
        elif isinstance(item, fx.Node):
            if _is_mask(item):
                raise Refused("indexing by a mask selects a number of rows that depends on data")
            lookups.append((dim, state.value(item)))
            dim += 1
        elif isinstance(item, int):  # before any tensor looks up: PyTorch selects first, where NumPy would broadcast
            alone = not any(isinstance(other, fx.Node) for other in items)
            if alone and _is_of_no_concern(state, value, source):
                return None
            value = selected(value, dim, item)
        else:
            raise Refused(f"indexing by {item!r}")
    if not lookups:
        cut = any(isinstance(item, slice) and item != slice(None) for item in items)
        return None if cut and is_plain(state.value(source)) and not _is_sparse(state, state.value(source)) else value
    picked = _picked(value, lookups)
    if picked is not None:
        return picked
    at = [dim for dim, _ in lookups]
    adjacent = at == list(range(at[0], at[0] + len(at)))
    return look_up(value, at, [found for _, found in lookups], at[0] if adjacent else 0)


def _picked(value: Value, lookups: list[tuple[int, Value]]) -> Value | None:
    """The weights of one expert's choices, read at the tokens that chose it: the weights of those assignments."""
    content = value.content
    if not isinstance(content, Special) or content.kind != "picked" or len(lookups) != 1:
        return None
    _, index = lookups[0]
    rows = rows_of_one(index)
    if (
        rows is None
        or rows.variable.by != content.about[0]
        or not isinstance(index.content, Index)
        or value.dims[lookups[0][0]] != index.content.atoms
    ):
        raise Refused("the weights of one expert's tokens, read at other tokens")
    return Value((*value.dims[: lookups[0][0]], *index.dims, *value.dims[lookups[0][0] + 1 :]), content.about[1])


def _is_of_no_concern(state: Interpretation, value: Value, source: fx.Node) -> bool:
    """Whether one row of it is a leaf like any other: no ids, no gates, no weights."""
    return is_plain(value) and not _integral(source) and not _is_sparse(state, value) and not _is_weight(state, value)


def _is_weight(state: Interpretation, value: Value) -> bool:
    """Whether the value is a view of a graph input, as weights are, or of several in one stack."""
    root = value.content.root if isinstance(value.content, terms.Element) else None
    if not isinstance(root, fx.Node):
        return False
    return root.op in ("placeholder", "get_attr") or (root in state.calls and state.calls[root].name == "stack")


def _is_sparse(state: Interpretation, value: Value) -> bool:
    return state.sparse_leaf(value.content) is not None


def _is_mask(node: fx.Node) -> bool:
    fake = fake_of(node)
    return getattr(fake, "dtype", None) is not None and str(fake.dtype) in ("torch.bool", "torch.uint8")


def _integral(node: fx.Node) -> bool:
    return not fake_of(node).dtype.is_floating_point


def _slice(state: Interpretation, value: Value, dim: int, item: slice, key: Any) -> Value:
    if item == slice(None):
        return value
    extent = radix.group_size(value.dims[dim])
    if not isinstance(extent, int):
        raise Refused("a slice of a dimension of symbolic size")
    bounds = [state.number(bound) if bound is not None else None for bound in (item.start, item.stop, item.step)]
    if any(bound is not None and not isinstance(bound, int) for bound in bounds):
        raise Refused("a slice with symbolic bounds")
    start, stop, step = slice(*bounds).indices(extent)
    return sliced(value, dim, start, len(range(start, stop, step)), step, key)


def _index_select(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    dim = call["dim"] % len(value.dims)
    return look_up(value, [dim], [state.value(call["index"])], dim)


def _embedding(call: Call, state: Interpretation) -> Value | None:
    if call["max_norm"] is not None or call["scale_grad_by_freq"] or call["sparse"] or call["padding_idx"] is not None:
        return None
    if _from_integers(call["input"]):
        return None
    return look_up(state.value(call["weight"]), [0], [state.value(call["input"])], 0)


def _from_integers(ids: fx.Node) -> bool:
    """Whether ids come from integers alone, as a text's tokens do: no score chose them, a vocabulary is no experts."""
    waiting, seen = [ids], {ids}
    while waiting:
        node = waiting.pop()
        if isinstance(fake_of(node), torch.Tensor) and fake_of(node).dtype.is_floating_point:
            return False
        waiting += [argument for argument in node.all_input_nodes if argument not in seen]
        seen.update(node.all_input_nodes)
    return True


def _gather(call: Call, state: Interpretation) -> Value | None:
    """A gather along one dimension whose index repeats along all the others: a lookup of whole rows."""
    value, index = state.value(call["input"]), state.value(call.arguments.get("index", call.arguments.get("indices")))
    if (
        is_plain(value)
        and len(value.dims) < 3
        and not any(atom.variable.rank >= 3 for group in index.dims for atom in group)
    ):
        return None
    dim = (call["dim"] or 0) % len(value.dims)
    along = rows_index(index, dim)
    check_wrapped(call, along, radix.group_size(value.dims[dim]), state)
    return look_up(value, [dim], [along], dim)


def check_wrapped(call: Call, index: Value, extent: Size, state: Interpretation) -> None:
    """Raises Refused where take_along_dim, which takes an index modulo the extent, may meet one beyond it."""
    known = known_range(index.content, state) if isinstance(index.content, terms.Element) else 0
    if call.name == "take_along_dim" and (known is None or not radix.is_at_least(extent, known)):
        raise Refused("take_along_dim with ids that may lie outside, which it wraps around")


def rows_index(index: Value, dim: int) -> Value:
    """A full-rank index that is the same along every dimension but `dim`, as the one-dimensional index it repeats."""
    for number, group in enumerate(index.dims):
        if number != dim and any(
            atom.variable.kind != "free" or substitution.mentions(index.content, atom) for atom in group
        ):
            raise Refused("an index that differs along the features")
    return Value((index.dims[dim],), index.content)


def _arange(call: Call, state: Interpretation) -> Value | None:
    bounds = list(call["bounds"])
    keywords = [call.arguments.get(name) for name in ("start", "end", "step")]
    start = keywords[0] if keywords[0] is not None else (bounds[0] if len(bounds) > 1 else 0)
    step = keywords[2] if keywords[2] is not None else (bounds[2] if len(bounds) > 2 else 1)
    dtype = fake_of(call.node).dtype
    if start != 0 or step != 1 or dtype.is_floating_point or not holds_integers(dtype):
        return None
    (size,) = state.shape(call.node)
    atoms: Group = free(size, (call.node, "arange"))
    return Value((atoms,), Index(atoms))


# ---- writes through a permutation: target[index] = source


def of_rows(index: Any) -> Any:
    """An index without the whole dimensions that it ends with, and without a tuple around one."""
    if not isinstance(index, tuple):
        return index
    items = [*index]
    while len(items) > 1 and isinstance(items[-1], slice) and items[-1] == slice(None):
        items.pop()
    return items[0] if len(items) == 1 else tuple(items)


def _setitem(call: Call, state: Interpretation) -> Value | None:
    index = of_rows(call["index"])
    if not isinstance(index, fx.Node) or _is_mask(index):
        raise Refused("an assignment into part of a tensor")
    return permuted_write(call, state, call["input"], state.value(index), call["value"])


def _index_put(call: Call, state: Interpretation) -> Value | None:
    indices = call["indices"]
    if call["accumulate"] is not False or len(indices) != 1 or not isinstance(indices[0], fx.Node):
        raise Refused("an assignment into part of a tensor")
    return permuted_write(call, state, call["input"], state.value(indices[0]), call["values"])


def _index_copy(call: Call, state: Interpretation) -> Value | None:
    if call["dim"] != 0:
        raise Refused("an assignment into part of a tensor")
    return permuted_write(call, state, call["input"], state.value(call["index"]), call["source"])


def permuted_write(call: Call, state: Interpretation, target: fx.Node, index: Value, source: Any) -> Value | None:
    """target[index] = source along dimension 0, where index is a permutation of all its rows.

    The source's rows in the other order.
    """
    rows = state.value(source)
    if rows_of_one(index) is not None:
        return assigned_rows(call, state, target, index, rows)
    if len(index.dims) != 1 or not isinstance(index.content, Index) or len(rows.dims) != len(state.shape(target)):
        raise Refused("an assignment through an index that is not a permutation")
    covered = enumerates(index.dims[0])
    if covered is None or (covered != index.content.atoms and index.dims[0] != index.content.atoms):
        if not _is_inverse(index):
            raise Refused("an assignment through an index that is not a permutation")
    if state.shape(target)[0] != radix.group_size(index.content.atoms):
        raise Refused("an assignment that leaves rows unwritten")
    dims, contents = unify([Value((index.dims[0],) + ((),) * (len(rows.dims) - 1), index.content), rows])
    if dims[0] != index.dims[0]:
        raise Refused("an assignment of rows in another order than its index")
    return Value((index.content.atoms, *dims[1:]), contents[1])


def _is_inverse(index: Value) -> bool:
    """dims (j), content Index(order) where the order enumerates exactly j: the inverse permutation."""
    content = index.content
    return (
        isinstance(content, Index)
        and len(content.atoms) == 1
        and enumerates(content.atoms) == index.dims[0]
        and content.atoms[0].variable.kind == "order"
    )


# ---- scatters


def _scatter(call: Call, state: Interpretation) -> Value | None:
    """scatter along one dimension: a one-dimensional permutation, or marks at a token's experts."""
    target, index = state.value(call["input"]), state.value(call["index"])
    source = call.arguments.get("src", call.arguments.get("value"))
    if call["reduce"] is not None:
        raise Refused("scatter with a reduction")
    if len(index.dims) == 1:
        return permuted_write(call, state, call["input"], index, _all_of(source, call, state))
    dim = call["dim"] % len(index.dims)
    if (
        len(index.dims) == 2
        and dim == 1
        and isinstance(target.content, Constant)
        and not isinstance(target.content.value, bool | None)
    ):
        return _marks(call, state, target.content.value, index, source)
    if len(index.dims) == 2 and dim == 1 and isinstance(target.content, Constant):
        return _marks(call, state, int(target.content.value), index, source)
    along = rows_index(index, dim)
    return permuted_write(call, state, call["input"], along, _all_of(source, call, state)) if dim == 0 else None


def _all_of(source: Any, call: Call, state: Interpretation) -> Any:
    """The source of a scatter; Refused where the index leaves out a part of it, or of the target's other dimensions."""
    index, target = state.shape(call["index"]), state.shape(call["input"])
    if index[1:] != target[1:] or (isinstance(source, fx.Node) and state.shape(source) != index):
        raise Refused("a scatter of a part of its source, or into a part of its target")
    return source


def _marks(call: Call, state: Interpretation, outside: float | int, index: Value, source: Any) -> Value | None:
    """full(outside).scatter(1, ids, source).

    A (tokens, experts) leaf that is `outside` away from each token's experts; a mask if 0 and 1.
    """
    from moecompile.passes.interpret import (
        Sparse,
    )

    tokens, experts = state.shape(call.node)
    if radix.group_size(index.dims[0]) != tokens:
        raise Refused("marks for some of the tokens only")
    if outside == 0 and source in (1, True, 1.0) and not isinstance(source, fx.Node):
        atom = Atom(Variable("free", (call.node, "expert")), 1, experts)
        return Value((index.dims[0], (atom,)), Special("chosen", (index, atom)))
    state.sparse[call.node] = Sparse(index, outside)
    return state.leaf(call.node)


def _one_hot(call: Call, state: Interpretation) -> Value | None:
    value = state.value(call["input"])
    classes = call["num_classes"]
    if not isinstance(classes, int) or classes < 1:
        return None
    atom = Atom(Variable("free", (call.node, "expert")), 1, classes)
    return Value((*value.dims, (atom,)), Equals(value.content, atom))


RULES: dict[str, Rule] = {
    "getitem": _getitem,
    "index_select": _index_select,
    "embedding": _embedding,
    "gather": _gather,
    "take_along_dim": _gather,
    "arange": _arange,
    "setitem": _setitem,
    "index_put": _index_put,
    "index_copy": _index_copy,
    "scatter": _scatter,
    "one_hot": _one_hot,
}
