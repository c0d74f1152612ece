"""Bring values to common indices: broadcasting, and looking up one value at the indices another one holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moecompile.passes import radix, substitution, terms
from moecompile.passes.interpret import Refused
from moecompile.passes.terms import (
    Atom,
    Constant,
    Content,
    Count,
    Element,
    Fixed,
    Group,
    Index,
    Looked,
    Offsets,
    Part,
    Value,
    Variable,
)
from moecompile.passes.token_exchange import Own


def _rank(group: Group) -> int:
    return max((atom.variable.rank for atom in group), default=-1)


def _choose(groups: Sequence[Group]) -> Group:
    """The group the others give way to: the one of highest rank, the first among equals."""
    return max(groups, key=_rank, default=())


def _renaming(group: Group, target: Group) -> list[tuple[Atom, Part]]:
    if group == target:
        return []
    pairs = radix.align(group, target)
    if pairs is None:
        raise Refused("dimensions of different extents meet")
    for old, new in pairs:
        if old != new and old.variable.rank >= 3:
            raise Refused("rows in different orders meet")
    return [(old, new.variable.key.says(new) if new.variable.kind == "places" else new) for old, new in pairs]


def unify(values: Sequence[Value]) -> tuple[tuple[Group, ...], list[Content]]:
    """Right-aligned broadcasting: the common dims, and each value's content at them.

    Raises Refused if two dimensions enumerate different things: rows sorted differently, or extents that do not divide.
    """
    rank = max(len(value.dims) for value in values)
    padded = [Value(((),) * (rank - len(value.dims)) + value.dims, value.content) for value in values]
    dims = tuple(_choose([value.dims[number] for value in padded if value.dims[number]]) for number in range(rank))
    contents = []
    for value in padded:
        pairs: list[tuple[Atom, Part]] = []
        for group, target in zip(value.dims, dims, strict=True):
            if group:
                pairs += _renaming(group, target)
        contents.append(substitution.rename(value, _deduplicated(pairs)).content)
    return dims, contents


def _deduplicated(pairs: Sequence[tuple[Atom, Part]]) -> list[tuple[Atom, Part]]:
    seen: dict[Atom, Part] = {}
    for old, new in pairs:
        if seen.setdefault(old, new) != new:
            raise Refused("one index would have to be two")
    return list(seen.items())


def look_up(value: Value, dims: Sequence[int], indices: Sequence[Value], place: int) -> Value:
    """value[..., index, ...]: dimension dims[i] read at indices[i]; their common dims stand at `place` of the result.

    A lookup along exactly the index a dimension enumerates (rows in an order, at that order's inverse) leaves the
    content as it is.
    """
    if isinstance(value.content, (Count, Offsets)):
        raise Refused("the experts' counts or offsets, read in another order than the experts'")
    common, contents = unify(indices)
    value = _apart(value, dims)
    content: Content = value.content
    for dim, index in zip(dims, contents, strict=True):
        content = _at(content, value.dims[dim], index)
    rest = [group for number, group in enumerate(value.dims) if number not in dims]
    before = sum(1 for number in range(place) if number not in dims)
    return Value((*rest[:before], *common, *rest[before:]), content)


def _apart(value: Value, dims: Sequence[int]) -> Value:
    """The value with names of their own for dimensions that are looked up one after the other.

    What the first is looked up by may speak of the second's names.
    """
    if len(dims) < 2:
        return value
    atoms = [atom for dim in dims for atom in value.dims[dim] if atom.variable.rank < 3]
    names = (Atom(Variable("free", ("looked up", number)), 1, atom.size) for number, atom in enumerate(atoms))
    return substitution.rename(value, list(zip(atoms, names, strict=True)))


def _at(content: Content, group: Group, index: Content) -> Content:
    if isinstance(index, Index):
        if index.atoms == group:
            return content
        pairs = radix.align(group, index.atoms)
        if pairs is None or any(old != new and old.variable.rank >= 3 for old, new in pairs):
            raise Refused("an index that does not run over the rows it is used on")
        return substitution.rename(Value((), content), _deduplicated(pairs)).content
    if isinstance(index, Constant) and isinstance(index.value, int):
        if len(group) != 1 or group[0].variable.rank >= 3:
            raise Refused("one index of a dimension that holds several indices")
        extent = radix.group_size(group)
        position = index.value % extent if isinstance(extent, int) else index.value
        return substitution.substitute(content, group[0], Fixed(position, extent))
    if isinstance(index, (Element, terms.Special)) and len(group) == 1 and group[0].variable.rank < 3:
        return substitution.substitute(content, group[0], Looked(index, group[0].size))
    raise Refused("an index that detection does not understand")


def per_expert(value: Value) -> bool:
    """Whether counts or offsets stand one an expert, in the experts' own order: what their content does not say."""
    content = value.content
    if not isinstance(content, (Count, Offsets)) or len(value.dims) != 1:
        return False
    group = value.dims[0]
    return radix.group_size(group) == content.num_experts and all(
        atom.variable.kind == "free" and len(group) == 1 for atom in group
    )


def enumerates(group: Group) -> Group | None:
    """The assignments' digits a dimension runs through, each combination once.

    Its own atoms, or those of the order it stands for.
    """
    if (
        len(group) == 1
        and group[0].variable.kind == "order"
        and group[0].size == radix.group_size(group[0].variable.group)
    ):
        return group[0].variable.group
    if any(atom.variable.rank >= 3 for atom in group):
        return None
    return group


def without(group: Group, digits: Group) -> Group | None:
    """The digits of `group` that are left when `digits` are taken out; None if they are not all in it."""
    rest: list[Any] = list(group)
    for digit in digits:
        cut: list[Atom] = []
        found = False
        for atom in rest:
            pieces = substitution._replace_atom(atom, digit, digit)
            found = found or digit in pieces
            cut += [piece for piece in pieces if isinstance(piece, Atom)]
        if not found:
            return None
        rest = [atom for atom in cut if atom != digit]
    return radix.merge(rest)


def rows_covered(group: Group) -> bool:
    """Whether a dimension runs through assignments (or a permutation of all of them), each once.

    No repeats, no subsets.
    """
    covered = enumerates(group)
    return covered is not None and all(atom.variable.kind in ("ids", "leaf") for atom in covered)


def run_once_through(dims: Iterable[Group], key: Content) -> bool:
    """Whether dimensions that run through assignments have as many elements as the key does: each of it once."""
    if isinstance(key, Own):
        groups = [*dims]
        return len(groups) == 1 and len(groups[0]) == 1 and groups[0][0] == key.exchange.arrived(groups[0][0].size)
    own = [part for part in key.index if isinstance(part, Atom)] if isinstance(key, Element) else []
    return radix.difference(radix.product(map(radix.group_size, dims)), radix.group_size(own)) == 0
