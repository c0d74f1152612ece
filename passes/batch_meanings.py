"""Where the values of a graph hold the batch: what rules of operators (`batch_rules`) are asked and say.

A value holds the batch in one dimension, each element's share of it one behind the other; or it is the same for all
elements; or it numbers them; or it is inside a block of experts, as moecompile's passes write them, which only the
operators of such a block read; or nobody knows, for a reason.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from moecompile.passes.costs import expression
from moecompile.passes.joint_graph import argument


@dataclasses.dataclass(frozen=True)
class Rows:
    """The batch, or so many rows for each of its elements, is this dimension."""

    dim: int


@dataclasses.dataclass(frozen=True)
class Numbered:
    """The numbers of the elements, from 0 on, are along this dimension; the same in all others."""

    dim: int


class Whole(enum.Enum):
    """Of a value that does not hold the batch."""

    SHARED = "the same for all elements of the batch"
    INSIDE = "inside a block of experts"


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Elements of the batch may have been mixed, for this reason."""

    reason: str


Meaning = Rows | Numbered | Whole | Mixed
SHARED, INSIDE = Whole.SHARED, Whole.INSIDE


class NotProvenError(Exception):
    """What keeps a value from being proven; the message is a reason for people."""


class Meanings:
    """Of the values of a graph, whose batch is this symbol."""

    def __init__(self, batch: sympy.Symbol) -> None:
        self.batch, self.of = batch, dict[fx.Node, Meaning]()

    def at(self, node: Any) -> int | None:
        """The dimension in which it holds the batch; None for what is shared.

        Raises:
            NotProvenError: it is inside a block of experts, or numbers the elements, otherwise in each half.
        """
        if not isinstance(node, fx.Node) or not isinstance(value_of(node), Tensor):
            return None
        meaning = self.of[node]
        if meaning is INSIDE:
            raise NotProvenError(f"{node.name} is read outside of its block of experts")
        if isinstance(meaning, Numbered):
            raise NotProvenError(f"{node.name} numbers the elements of the batch")
        return meaning.dim if isinstance(meaning, Rows) else None

    def of_first(self, node: fx.Node) -> int:
        """Where the first tensor holds it, if it is the only one that does."""
        first, *others = node.all_input_nodes
        place = self.at(first)
        if place is None or any(self.at(each) is not None for each in others):
            raise NotProvenError(f"{node.target} is given rows of the batch where none were expected")
        return place

    def by_shape(self, node: fx.Node) -> Meaning:
        """Of what is the same everywhere, or comes in: whether the batch is one of its dimensions."""
        sizes = [expression(size) for size in value_of(node).shape]
        places = [place for place, size in enumerate(sizes) if self.batch in size.free_symbols]
        if len(places) > 1 or (places and not self.leads(sizes[places[0]])):
            raise NotProvenError(f"{node.name} has the batch in several dimensions: {tuple(sizes)}")
        return Rows(places[0]) if places else SHARED

    def leads(self, size: sympy.Expr) -> bool:
        """Whether it is a multiple of the batch; raises for any other number that depends on it."""
        if self.batch not in size.free_symbols:
            return False
        each = sympy.simplify(size / self.batch)
        if self.batch in each.free_symbols or not each.is_integer:
            raise NotProvenError(f"{size} rows are no multiple of the batch {self.batch}")
        return True

    def depends(self, given: Any) -> bool:
        """Whether a size or number, or those of a tensor, depend on the batch."""
        if isinstance(given, Tensor):
            return any(self.batch in expression(size).free_symbols for size in given.shape)
        if isinstance(given, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.batch in sympy.sympify(given.node.expr).free_symbols
        return False

    def aligned(self, node: fx.Node, given: Iterable[Any], dims: int | None = None) -> Rows:
        """By element, with broadcasting: rows meet rows of the same numbers, or what is the same for all of them.

        Args:
            node: that they are given to.
            given: what is broadcast; no tensors are left out.
            dims: of what they are broadcast to; those of the result if None.
        """
        places = dict[fx.Node, int]()
        tensors = [each for each in given if isinstance(each, fx.Node) and isinstance(value_of(each), Tensor)]
        for each in tensors:
            if (place := self.at(each)) is not None:
                places[each] = value_of(each).dim() - place
        if len({*places.values()}) != 1:
            raise NotProvenError(f"{node.target} puts rows of the batch beside others: {self.words(tensors)}")
        (first, behind), *_ = places.items()
        size = expression(value_of(first).shape[-behind])
        for each in tensors:
            value = value_of(each)
            own = expression(value.shape[-behind]) if value.dim() >= behind else sympy.Integer(1)
            if own != (size if each in places else 1):
                raise NotProvenError(f"{node.target} puts rows of the batch beside others: {self.words(tensors)}")
        return Rows((first_of(value_of(node)).dim() if dims is None else dims) - behind)

    def numbers(self, node: fx.Node) -> bool:
        """Whether a call of arange gives one number for each element, from 0 on."""
        given = {name: argument(node, name) for name in ("start", "end", "step") if _takes(node, name)}
        end = given.pop("end")
        size = expression(value_of(end)) if isinstance(end, fx.Node) else sympy.sympify(end)
        return size == self.batch and given.get("start", 0) == 0 and given.get("step", 1) == 1

    def with_rows(self, node: fx.Node, dim: int) -> Meanings:
        """The same, but that this node holds the batch."""
        other = Meanings(self.batch)
        other.of = {**self.of, node: Rows(dim)}
        return other

    def words(self, nodes: Iterable[fx.Node]) -> str:
        """For people."""
        return ", ".join(f"{node.name} {tuple(value_of(node).shape)}" for node in nodes)


def _takes(node: fx.Node, name: str) -> bool:
    return any(each.name == name for each in node.target._schema.arguments)  # type: ignore[union-attr]


def value_of(node: fx.Node) -> Any:
    """Its example value."""
    return node.meta.get("val")


def first_of(value: Any) -> Tensor:
    """The first tensor of a result."""
    found: Tensor = next(each for each in tree_leaves(value) if isinstance(each, Tensor))
    return found
