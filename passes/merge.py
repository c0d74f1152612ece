"""One term for all experts out of one term an expert.

Code that names its experts one by one (a loop, unrolled by the time the graph is captured) computes E terms that differ
only in the expert: its fixed number in a stacked weight, or its own weight tensors. `merge` finds the term they are all
instances of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from moecompile.passes import substitution
from moecompile.passes.interpret import Refused
from moecompile.passes.terms import (
    Apply,
    Atom,
    Constant,
    Content,
    Contract,
    Element,
    Fixed,
    Part,
    Size,
    Stacked,
    Variable,
)


def expert_atom(num_experts: Size) -> Atom:
    """The index that runs over the merged experts."""
    return Atom(Variable("expert", "merged"), 1, num_experts)


def merge(contents: Sequence[Content], key: fx.Node) -> Content:
    """The one term that contents[e], expert e's term, are instances of; `expert_atom` stands where they differ.

    `key`, the node of the result, names its contracted indices.

    Raises Refused if the terms differ in anything but the expert.
    """
    return _merged([_with_common_bounds(content, key, []) for content in contents], expert_atom(len(contents)))


def _with_common_bounds(content: Content, key: fx.Node, seen: list[Atom]) -> Content:
    """Contracted indices renamed in order of appearance, so that equal products look equal."""
    if isinstance(content, Contract):
        bound = Atom(Variable("bound", (key, len(seen))), 1, content.over.size)
        seen.append(bound)
        left = _with_common_bounds(substitution.substitute(content.left, content.over, bound), key, seen)
        right = _with_common_bounds(substitution.substitute(content.right, content.over, bound), key, seen)
        return Contract(left, right, bound, content.dtype)
    if isinstance(content, Apply):
        return Apply(
            content.op, tuple(_with_common_bounds(argument, key, seen) for argument in content.args), content.params
        )
    return content


def _merged(contents: Sequence[Content], expert: Atom) -> Content:
    first = contents[0]
    if all(content == first for content in contents) and not _mentions_expert(first):
        return first
    if any(type(content) is not type(first) for content in contents):
        raise Refused("the experts compute different things")
    if isinstance(first, Apply):
        others: list[Any] = list(contents)
        if any(
            (other.op, len(other.args), other.params) != (first.op, len(first.args), first.params) for other in others
        ):
            raise Refused("the experts compute different things")
        return Apply(
            first.op,
            tuple(_merged([other.args[place] for other in others], expert) for place in range(len(first.args))),
            first.params,
        )
    if isinstance(first, Contract):
        products: list[Any] = list(contents)
        if any((other.over, other.dtype) != (first.over, first.dtype) for other in products):
            raise Refused("the experts compute products of different shapes or dtypes")
        left = _merged([other.left for other in products], expert)
        return Contract(left, _merged([other.right for other in products], expert), first.over, first.dtype)
    if isinstance(first, Element):
        return _merged_elements([content for content in contents if isinstance(content, Element)], expert)
    raise Refused("the experts compute different things")


def _mentions_expert(content: Content) -> bool:
    return isinstance(content, Element) and any(isinstance(part, Fixed) for part in content.index)


def _merged_elements(elements: Sequence[Element], expert: Atom) -> Element:
    first = elements[0]
    if any(element.written is not None for element in elements):
        raise Refused(f"the experts' tensor {first.root} was written into")
    if all(element.root is first.root for element in elements):
        return Element(first.root, _numbered([element.index for element in elements], expert))
    roots = tuple(element.root for element in elements if isinstance(element.root, fx.Node))
    if len(set(roots)) != len(elements):
        raise Refused(f"two experts share {first.root}")
    if any(element.index != first.index for element in elements):
        raise Refused("the experts' weights are used at different indices")
    return Element(Stacked(roots), (expert, *first.index))


def _numbered(indices: Sequence[tuple[Part, ...]], expert: Atom) -> tuple[Part, ...]:
    """Indices that are equal but for one fixed digit, which is 0, 1, 2, ...

    For the experts in order: that digit becomes the expert.
    """
    first = indices[0]
    if any(len(index) != len(first) for index in indices):
        raise Refused("the experts' weights are used at different indices")
    result: list[Part] = []
    for place, part in enumerate(first):
        parts = [index[place] for index in indices]
        if isinstance(part, Fixed) and parts == [Fixed(number, expert.size) for number in range(len(indices))]:
            result.append(expert)
        elif all(other == part for other in parts):
            result.append(part)
        else:
            raise Refused("an expert uses another expert's weight")
    return tuple(result)


def flattened(content: Content) -> list[Content]:
    """The terms of a chain of additions; numbers 0 that a chain began with are left out."""
    if isinstance(content, Apply) and content.op == "add":
        return [term for argument in content.args for term in flattened(argument)]
    return [] if content == Constant(0) else [content]
