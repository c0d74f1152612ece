"""Products with masks, dispatch and combine tensors: einsum, matmul and bmm come here before the general rule.

mask, mask       -> mask              "se,sc->sec", "tke,tkc->tec" (a sum over choices), "tk,tke,tkc->tec"
dispatch, tokens -> rows in places    "tec,td->ecd", "gsec,gsd->egcd", or flattened: "xt,td->xd" with x = (e, c)
combine, rows    -> tokens            "tec,ecd->td", "gsec,egcd->gsd", or flattened: "tx,xd->td"
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from moecompile.passes import radix, substitution, terms
from moecompile.passes.capacity import Marks, Sum, as_terms, of_terms, over_choices, own_expert, product, scaled
from moecompile.passes.dispatch import Places, Tensor, is_whole, take_apart
from moecompile.passes.interpret import Combine, Interpretation, Passed, Refused, walk
from moecompile.passes.places import Number
from moecompile.passes.routing import ASSIGNMENT
from moecompile.passes.rules_capacity import check_counts, in_dtype
from moecompile.passes.terms import (
    Apply,
    Atom,
    Content,
    Contract,
    Count,
    Element,
    Equals,
    Group,
    Index,
    Meaning,
    Part,
    Total,
    Value,
)
from moecompile.passes.unify import _choose, _deduplicated, _renaming

Labels = Mapping[str, Group]
_REACH = 60  # how far back a reason is looked for, in nodes


def einsum(
    state: Interpretation, node: fx.Node, left: Value, right: Value, equation: str, casts: tuple[str | None, ...]
) -> Value | None:
    """A product of two operands by an equation in single letters. Raises Passed if none of them is of this form."""
    values = (_converted(left, casts[0]), _converted(right, casts[1]))
    marked = [_is_marks(value) for value in values]
    placed = [any(_is_place(atom) for group in value.dims for atom in group) for value in values]
    if not any(marked) and not any(placed):
        _check_sum_over_places(state, left, right, equation)
        raise Passed
    inputs, output = equation.split("->")
    first, second = inputs.split(",")
    if len(set(first)) != len(first) or len(set(second)) != len(second):
        raise Refused(f"a product {equation} along a diagonal")
    labels = (dict(zip(first, values[0].dims, strict=True)), dict(zip(second, values[1].dims, strict=True)))
    contracted = any(label not in output for label in labels[0] if label in labels[1])
    for number, (value, own) in enumerate(zip(values, labels, strict=True)):
        other, others = values[1 - number], labels[1 - number]
        if placed[number] and (marked[1 - number] or _contracts_places(own, output)):
            return _recorded(_read_back, state, node, (other, others), (value, own), output, number)
        if marked[number] and contracted and not any(placed) and not marked[1 - number] and not set(others) <= set(own):
            if isinstance(value.content, Equals):
                raise Passed
            return _recorded(_put_in, state, node, (value, own), (other, others), output, number)
    if any(placed) or (contracted and not all(marked) and any(isinstance(value.content, Equals) for value in values)):
        raise Passed
    return _multiplied(state, node, values, labels, output)


def _converted(value: Value, dtype: str | None) -> Value:
    """The operand as autocast converts it."""
    if dtype is None:
        return value
    if _is_marks(value):
        return Value(value.dims, in_dtype(value.content, getattr(torch, dtype)))
    return Value(value.dims, Apply("cast", (value.content,), (dtype,)))


Side = tuple[Value, dict[str, Group]]


def _recorded(rule: object, state: Interpretation, node: fx.Node, *arguments: object) -> Value | None:
    """The rule's result; a refusal is noted, as dispatch tensors are no rows of experts for whose sake it would be."""
    try:
        return rule(state, node, *arguments)  # type: ignore[operator]
    except Refused as reason:
        state.refusals[node] = str(reason)
        raise


def _is_marks(value: Value) -> bool:
    content = value.content
    return isinstance(content, (Marks, Sum, Number)) or (isinstance(content, Equals) and isinstance(content.atom, Atom))


def _is_place(atom: Atom) -> bool:
    return atom.variable.kind == "places"


def _contracts_places(labels: Labels, output: str) -> bool:
    return any(_is_place(atom) for label, group in labels.items() if label not in output for atom in group)


# ---- masks


def _multiplied(
    state: Interpretation, node: fx.Node, values: tuple[Value, Value], labels: tuple[Labels, Labels], output: str
) -> Value | None:
    """A product of masks, or of masks and weights. Contracted are choices, or experts where a mask picks its own."""
    names = dict.fromkeys([*labels[0], *labels[1]])
    groups = {label: _choose([own[label] for own in labels if label in own]) for label in names}
    contents = []
    for value, own in zip(values, labels, strict=True):
        pairs = [pair for label, group in own.items() if group for pair in _renaming(group, groups[label])]
        contents.append(substitution.rename(Value((), value.content), _deduplicated(pairs)).content)
    contracted = [label for label in groups if label not in output]
    if any(label not in own for label in contracted for own in labels):
        raise Refused("a product that sums one operand alone")
    over: Group = tuple(atom for label in contracted for atom in groups[label])
    numbers = [content for content in contents if isinstance(content, Number)]
    dims = tuple(groups[label] for label in output)
    if numbers:
        check_counts(state, node)
        masked = scaled(numbers[0], contents[1] if contents[0] is numbers[0] else contents[0])
        return Value(dims, own_expert(masked, over[0]) if len(over) == 1 else masked if not over else _refuse())
    sides = [_as_weighted(content) for content in contents]
    found = [product(first, second) for first in sides[0] for second in sides[1]]
    if not over:
        return Value(dims, of_terms(found))
    if len(found) == 1 and all(atom.variable.kind == "ids" for atom in over):
        return Value(dims, over_choices(found[0], over, node))
    return None


def _refuse() -> Content:
    raise Refused("a sum of places over something else than experts")


def _as_weighted(content: Content) -> tuple[Marks, ...]:
    found = as_terms(content)
    if found is not None:
        return found
    if isinstance(content, (Meaning, Index, Count, terms.Offsets, terms.Special, Total)):
        raise Refused("marks of assignments multiplied by something else than a mask or a weight")
    return (Marks(frozenset(), content),)


# ---- rows into places


def _put_in(
    state: Interpretation, node: fx.Node, dispatch: Side, tokens: Side, output: str, number: int
) -> Value | None:
    """dispatch, tokens -> rows in places."""
    value, own = dispatch
    rows, others = tokens
    if not is_whole(value):
        raise Refused("tokens' rows multiplied by a mask that is not of one place of one expert for each assignment")
    if isinstance(rows.content, (Meaning, Index, Count, terms.Offsets, terms.Special)):
        raise Refused("a dispatch tensor multiplied by something that is no tokens' rows")
    if any(isinstance(inner, Contract) for inner in walk(rows.content)):
        raise Refused(_refused_before(rows.content, state) or "rows are read back from places they were not put at")
    tensor = take_apart(value, state, node)
    contracted, groups = _token_labels(tensor, own, others, output)
    if not set(contracted) | set(groups) <= set(others) or any(
        label in others for label in own if label not in (*contracted, *groups)
    ):
        raise Refused("a dispatch tensor multiplied by something that is no tokens' rows")
    if any(label not in output and label not in contracted for label in others):
        raise Refused("a dispatch tensor's product that sums over features")
    places = _places(tensor, groups, own)
    pairs: list[tuple[Atom, Part]] = []
    for label in (*contracted, *groups):
        aligned = radix.align(others[label], tuple(tensor.token(atom) for atom in own[label]))
        if aligned is None or any(old.variable.rank >= 3 for old, _ in aligned):
            raise Refused("a dispatch tensor of other tokens than the rows'")
        pairs += aligned
    content = substitution.rename(Value((), rows.content), _deduplicated(pairs)).content
    dims: list[Group] = []
    for label in output:
        if label in own:
            found = [tensor.stands_at(atom, places) for atom in own[label]]
            dims.append(radix.merge(atom for atom in found if atom is not None))
        else:
            dims.append(others[label])
    return Value(tuple(dims), _weighted(tensor, content, number))


def _check_sum_over_places(state: Interpretation, left: Value, right: Value, equation: str) -> None:
    """Experts' rows summed over two dimensions at once: what the other operand would have to be was refused earlier."""
    inputs, output = equation.split("->")
    first, second = inputs.split(",")
    if sum(label in second and label not in output for label in first) < 2:
        return
    for rows, other in ((left, right), (right, left)):
        experts = any(isinstance(inner, Contract) for inner in walk(rows.content))
        if experts and isinstance(other.content, Element) and isinstance(other.content.root, fx.Node):
            reason = _refused_above(other.content.root, state)
            raise Refused(reason or f"experts' rows are summed by {other.content.root}, whose zeros are not known")


def _refused_above(node: fx.Node, state: Interpretation) -> str | None:
    """The nearest refusal among what a tensor is made of."""
    waiting = [node]
    for earlier in waiting:
        if earlier in state.refusals:
            return state.refusals[earlier]
        waiting += [argument for argument in earlier.all_input_nodes if argument not in waiting]
        if len(waiting) > _REACH:
            break
    return None


def _refused_before(content: Content, state: Interpretation) -> str | None:
    """Why a tensor that experts' rows are made of was not understood, if a reason is known."""
    roots = [inner.root for inner in walk(content) if isinstance(inner, Element) and isinstance(inner.root, fx.Node)]
    return next((state.refusals[root] for root in roots if root in state.refusals), None)


def _weighted(tensor: Tensor, content: Content, number: int) -> Content:
    if tensor.weight is None:
        return content
    return Apply("mul", (tensor.weight, content) if number == 0 else (content, tensor.weight))


def _token_labels(tensor: Tensor, own: Labels, others: Labels, output: str) -> tuple[list[str], list[str]]:
    """The labels of tokens that are summed over, and those that are kept: groups. Experts and places are kept."""
    contracted: list[str] = []
    groups: list[str] = []
    for label, group in own.items():
        rows = [tensor.is_row(atom) for atom in group]
        if any(rows) and not all(rows):
            raise Refused("a dispatch tensor whose tokens and experts are one dimension")
        if not any(rows) and label not in output and group:
            raise Refused("a sum over experts or places of a dispatch tensor")
        if any(rows) or (not group and label in others):
            (groups if label in output else contracted).append(label)
    return contracted, groups


def _places(tensor: Tensor, groups: list[str], own: Labels) -> Places:
    kept = sorted(tensor.rows.index(atom) for label in groups for atom in own[label])
    if not tensor.routing.domains <= set(kept):
        raise Refused("groups of tokens, each with its own running count of places, share their experts' places")
    return Places(tensor.routing, tuple(kept))


# ---- rows back from places


def _read_back(
    state: Interpretation, node: fx.Node, combine: Side, placed: Side, output: str, number: int
) -> Value | None:
    """combine, rows in places -> tokens: a sum over each token's choices."""
    value, own = combine
    rows, others = placed
    if not _is_marks(value) or not is_whole(value):
        raise Refused(
            "experts' rows are read back from their places by a tensor that may not be 0 away from a token's own"
        )
    found = {atom.variable.key for group in rows.dims for atom in group if _is_place(atom)}
    (places,) = found
    assert isinstance(places, Places)
    tensor = take_apart(value, state, node)
    _check_same(tensor, places)
    for label in dict.fromkeys([*own, *others]):
        _check_label(label, tensor, places, own.get(label), others.get(label), label in output)
    dims = []
    for label in output:
        group = own.get(label)
        dims.append(others[label] if group is None else radix.merge(tensor.token(atom) for atom in group))
    content = _weighted(tensor, rows.content, 1 - number)
    top_k = tensor.routing.top_k
    over: Group = () if top_k == 1 else (Atom(ASSIGNMENT, 1, top_k),)
    state.combine(Combine(node, Value(tuple(dims), Total(content, over, state.dtype(node)))))
    return state.leaf(node)


def _check_same(tensor: Tensor, places: Places) -> None:
    """The combine tensor must keep the same assignments at the same places as the dispatch tensor."""
    put, read = places.routing, tensor.routing
    if put == read:
        return
    if [column.key for column in put.columns] != [column.key for column in read.columns]:
        raise Refused("rows are read back for other expert ids than they were put in for")
    if [column.place for column in put.columns] != [column.place for column in read.columns]:
        raise Refused("rows are read back from other places than they were put at")
    raise Refused("rows are read back by another capacity than they were put in by")


def _check_label(
    label: str, tensor: Tensor, places: Places, own: Group | None, other: Group | None, kept: bool
) -> None:
    if own is None:
        assert other is not None
        if any(_is_place(atom) for atom in other) or (other and not kept):
            raise Refused("experts' rows are read back by expert or by place alone")
        return
    if other is None:
        numbers = {tensor.rows.index(atom) if tensor.is_row(atom) else -1 for atom in own}
        if (own and not kept) or not numbers.isdisjoint({-1, *places.groups}):
            raise Refused("a combine tensor summed over its tokens, experts or places alone")
        return
    aligned = radix.align(own, other)
    if aligned is None or any(tensor.stands_at(atom, places) != at for atom, at in aligned):
        raise Refused("rows are read back from other places than they were put at")
    if kept and not all(tensor.is_row(atom) for atom in own):
        raise Refused("a combine tensor that is not summed over experts and places")
    if not kept and any(tensor.is_row(atom) for atom in own):
        raise Refused("a combine tensor that is summed over its tokens")
