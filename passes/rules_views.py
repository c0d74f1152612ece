"""Rules for operations that only rearrange: the content stays, the dims change."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from moecompile.passes import radix, substitution, terms
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Refused, Rule, is_plain
from moecompile.passes.terms import (
    Affine,
    Apply,
    Atom,
    Constant,
    Element,
    Fixed,
    Group,
    Index,
    Size,
    Special,
    Value,
    Variable,
)
from moecompile.passes.unify import per_expert
from moecompile.runtime.elementwise import dtype_name


def reshaped(value: Value, shape: tuple[Size, ...]) -> Value:
    """The value in another shape with the same elements in the same order."""
    groups = radix.regroup([atom for group in value.dims for atom in group], shape)
    if groups is None:
        raise Refused(f"a reshape to {shape} cuts through an index")
    return Value(groups, value.content)


def _reshape(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    fake, source = fake_of(call.node), fake_of(call["input"])
    if fake.dtype != source.dtype:
        raise Refused("a view as another dtype reads the bits, not the values")
    if isinstance(value.content, Constant):
        return constant(value.content, state.shape(call.node), call.node)
    return reshaped(value, state.shape(call.node))


def constant(content: Any, shape: tuple[Size, ...], key: Any) -> Value:
    """A tensor whose every element is the same."""
    return Value(tuple(free(size, (key, number)) for number, size in enumerate(shape)), content)


def free(size: Size, key: Any) -> Group:
    """A dimension along which nothing changes."""
    return () if size == 1 else (Atom(Variable("free", key), 1, size),)


def _dim(dim: Any, rank: int) -> int:
    if not isinstance(dim, int):
        raise Refused(f"expected a dimension number, got {dim!r}")
    return dim % rank if rank else 0


def _permuted(value: Value, order: tuple[int, ...]) -> Value:
    return Value(tuple(value.dims[dim] for dim in order), value.content)


def _transpose(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    order = list(range(len(value.dims)))
    first, second = _dim(call["dim0"], len(order)), _dim(call["dim1"], len(order))
    order[first], order[second] = order[second], order[first]
    return _permuted(value, tuple(order))


def _t(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    return _permuted(value, tuple(reversed(range(len(value.dims)))))


def _permute(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    dims = call["dims"]
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = dims[0]
    return _permuted(value, tuple(_dim(dim, len(value.dims)) for dim in dims))


def _getattr(call: Call, state: Interpretation) -> Value | None:
    if call["name"] not in ("T", "mT"):
        return None
    value = state.value(call["input"])
    if len(value.dims) < 2:
        return value
    order = list(range(len(value.dims)))
    if call["name"] == "T":
        return _permuted(value, tuple(reversed(order)))
    return _permuted(value, (*order[:-2], order[-1], order[-2]))


def _expand(call: Call, state: Interpretation) -> Value:
    """expand and expand_as: a dimension of size one becomes one along which nothing changes."""
    value = state.value(call["input"])
    shape, source = state.shape(call.node), state.shape(call["input"])
    added = len(shape) - len(source)
    groups: list[Group] = []
    for number, size in enumerate(shape):
        inner = number - added
        groups.append(value.dims[inner] if inner >= 0 and source[inner] == size else free(size, (call.node, number)))
        if inner >= 0 and source[inner] != size and source[inner] != 1:
            raise Refused("expand of a dimension that is not one")
    return Value(tuple(groups), value.content)


def _repeat(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    sizes = call["sizes"]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    dims: tuple[Group, ...] = ((),) * (len(sizes) - len(value.dims)) + value.dims
    groups = tuple(free(state.number(size), (call.node, number)) + dims[number] for number, size in enumerate(sizes))
    return Value(groups, value.content)


def _repeat_interleave(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    if isinstance(call["repeats"], fx.Node) and isinstance(fake_of(call["repeats"]), torch.Tensor):
        raise Refused("repeat_interleave by a tensor depends on data")
    if call["dim"] is None:
        value, dim = reshaped(value, (radix.product(state.shape(call["input"])),)), 0
    else:
        dim = _dim(call["dim"], len(value.dims))
    groups = list(value.dims)
    groups[dim] = groups[dim] + free(state.number(call["repeats"]), (call.node, dim))
    return Value(tuple(groups), value.content)


def _same(call: Call, state: Interpretation) -> Value:
    return state.value(call["input"])


def _dropout(call: Call, state: Interpretation) -> Value:
    """What is not training, or drops nothing, gives its input back."""
    p = call["p"]
    if call["training"] is not False and not (isinstance(p, (int, float)) and p == 0):
        raise Refused("dropout is random")
    return state.value(call["input"])


# ---- slices


def sliced(value: Value, dim: int, start: int, length: Size, step: int, key: Any) -> Value:
    """Elements start, start + step, ... of a dimension, `length` of them."""
    group = value.dims[dim]
    extent = radix.group_size(group)
    if start == 0 and step == 1 and length == extent:
        return value
    if len(group) != 1:
        raise Refused("a slice of a dimension that holds several indices")
    if isinstance(value.content, (terms.Count, terms.Offsets)):
        raise Refused("the counts or offsets of some of the experts")
    if group[0].variable.rank >= 2:
        raise Refused("a slice takes only some of the assignments")
    if length == 1:
        content = substitution.substitute(value.content, group[0], Fixed(start, extent))
        return Value((*value.dims[:dim], (), *value.dims[dim + 1 :]), content)
    atom = Atom(Variable("slice", key), 1, length)
    content = substitution.substitute(value.content, group[0], Affine(atom, start, step, extent))
    return Value((*value.dims[:dim], (atom,), *value.dims[dim + 1 :]), content)


def selected(value: Value, dim: int, index: int) -> Value:
    """One index of a dimension."""
    group = value.dims[dim]
    extent = radix.group_size(group)
    if isinstance(extent, int):
        index %= extent
    elif index < 0:
        raise Refused("a negative index into a dimension of symbolic size")
    content = value.content
    if isinstance(content, terms.Count) and isinstance(extent, int):
        if not per_expert(value):
            raise Refused("one expert's count, read in another order than the experts'")
        return Value((), Special("count", (content.key, index, extent)))
    if not group:
        return Value((*value.dims[:dim], *value.dims[dim + 1 :]), content)
    if len(group) != 1 or group[0].variable.rank >= 3:
        raise Refused("one index of a dimension that holds several indices")
    content = substitution.substitute(content, group[0], Fixed(index, extent))
    return Value((*value.dims[:dim], *value.dims[dim + 1 :]), content)


def _pieces(call: Call, state: Interpretation, dim: int) -> tuple[Value | None, ...]:
    """chunk, split, tensor_split: consecutive slices whose lengths the results show."""
    source = call.arguments.get("input", call.arguments.get("tensor"))
    value = state.value(source)
    dim = _dim(dim, len(value.dims))
    if _is_whole(value, state):
        return tuple(None for _ in fake_of(call.node))
    pieces, start = [], 0
    for number, piece in enumerate(fake_of(call.node)):
        length = radix.size_of(piece.shape[dim])
        if not isinstance(length, int):
            raise Refused("pieces of symbolic length")
        pieces.append(sliced(value, dim, start, length, 1, (call.node, number)))
        start += length
    return tuple(pieces)


def _is_whole(value: Value, state: Interpretation) -> bool:
    """A leaf that is neither a graph input, as weights are, nor gates: what is cut from it is a leaf of its own."""
    content = value.content
    if not is_plain(value) or not isinstance(content, Element) or state.sparse_leaf(content) is not None:
        return False
    assert isinstance(content.root, fx.Node)
    return content.root.op not in ("placeholder", "get_attr") and fake_of(content.root).dtype.is_floating_point


def _split(call: Call, state: Interpretation) -> tuple[Value | None, ...]:
    if call.name == "split":
        from moecompile.passes.rules_loop import split_by_counts

        rows = split_by_counts(call, state)
        if rows is not None:
            return rows
    return _pieces(call, state, call["dim"])


def _unbind(call: Call, state: Interpretation) -> tuple[Value | None, ...]:
    value = state.value(call["input"])
    dim = _dim(call["dim"], len(value.dims))
    if _is_whole(value, state):
        return tuple(None for _ in fake_of(call.node))
    return tuple(selected(value, dim, number) for number in range(len(fake_of(call.node))))


def _select(call: Call, state: Interpretation) -> Value | None:
    value = state.value(call["input"])
    if not isinstance(call["index"], int) or _is_whole(value, state):
        return None
    return selected(value, _dim(call["dim"], len(value.dims)), call["index"])


def _narrow(call: Call, state: Interpretation) -> Value | None:
    value = state.value(call["input"])
    if not isinstance(call["start"], int) or _is_whole(value, state):
        return None
    dim = _dim(call["dim"], len(value.dims))
    return sliced(value, dim, call["start"], state.number(call["length"]), 1, (call.node, 0))


def _cast(call: Call, state: Interpretation) -> Value | None:
    """A cast of integers (to floats too, which count exactly here) keeps the meaning; one of floats is an operation."""
    value = state.value(call["input"])
    before, after = state.dtype(call["input"]), state.dtype(call.node)
    if fake_of(call.node).device != fake_of(call["input"]).device:
        raise Refused("a copy to another device")
    if before == after:
        return value
    if isinstance(value.content, Constant):
        return Value(value.dims, Constant(in_dtype(in_dtype(value.content.value, before), after)))
    if not before.is_floating_point and holds_integers(after):
        return value
    if isinstance(value.content, (terms.Count, terms.Offsets)) and holds_integers(after):
        return value
    if isinstance(value.content, terms.Equals):  # zero or one in every dtype
        return value
    if isinstance(value.content, Special) and value.content.kind in ("chosen", "not chosen"):  # a mask in every dtype
        return value
    if is_plain(value) or isinstance(value.content, (Index, Special)):
        keep_sparse(call, state)
        return None
    if not after.is_floating_point:
        raise Refused(f"a cast to {after}, through which no gradient flows")
    return Value(value.dims, Apply("cast", (value.content,), (dtype_name(after),)))


def keep_sparse(call: Call, state: Interpretation) -> None:
    """A cast of a sparse leaf to another floating-point dtype is one."""
    value = state.value(call["input"])
    sparse = state.sparse_leaf(value.content)
    if sparse is not None and state.is_unmoved(value) and state.dtype(call.node).is_floating_point:
        state.sparse[call.node] = sparse


def holds_integers(dtype: torch.dtype) -> bool:
    """Whether a dtype holds counts of assignments exactly."""
    # float32 to 2**24, which `counted` checks where the number of assignments is known; two million tokens of eight
    # choices each, where it is symbolic
    return dtype in (torch.int32, torch.int64, torch.float32, torch.float64)


def in_dtype(number: float | int | bool, dtype: torch.dtype) -> float | int | bool:
    """What is left of a number in a dtype. Raises Refused if that is no number."""
    try:
        with _disable_current_modes():
            found = torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None).to(dtype).item()
    except (RuntimeError, TypeError) as error:
        raise Refused(f"{number} in {dtype}") from error
    if not isinstance(found, (int, float)):
        raise Refused(f"{number} in {dtype}")
    return found


RULES: dict[str, Rule] = {
    "view": _reshape,
    "view_as": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "unsqueeze": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
    "t": _t,
    "permute": _permute,
    "getattr": _getattr,
    "expand": _expand,
    "expand_as": _expand,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "contiguous": _same,
    "clone": _same,
    "dropout": _dropout,
    "chunk": _split,
    "split": _split,
    "tensor_split": _split,
    "unbind": _unbind,
    "select": _select,
    "narrow": _narrow,
    "cast": _cast,
}

# rearrange a tensor, whatever it holds
VIEWS = frozenset(name for name, rule in RULES.items() if rule in (_reshape, _transpose, _t, _permute, _expand, _same))

__all__ = ["RULES", "VIEWS", "Element", "constant", "free", "reshaped", "selected", "sliced"]
