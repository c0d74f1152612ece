"""What a meaning says of a tensor, computed from the leaves: an oracle for detection.

A rule that gives a wrong meaning is a wrong rewrite waiting for a graph in which nothing else objects. Terms are
evaluated as passes/terms.py defines them, with one axis for each index variable, in float64; meanings_of_forms.py adds
the terms that only one form has, meanings_checked.py compares with the tensors of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from moecompile.passes import interpret, terms
from moecompile.passes.interpret import Interpretation
from moecompile.passes.radix import extent_of
from moecompile.passes.terms import Atom, Content, Group, Part, Value, Variable

AXES = 14  # index variables that can be in play at once: dimensions, and sums inside one another
LIMIT = 1 << 24  # elements that one evaluation may take


class Unknown(Exception):
    """The oracle has no definition of a term."""


class Wrong(Exception):
    """A term that has no value: an index that nothing runs over, for example."""


# ---- indices


@dataclass(frozen=True)
class Space:
    """The digits of index variables that are fixed so far, as tensors of AXES dimensions that broadcast."""

    digits: dict[Variable, tuple[tuple[int, int, Tensor], ...]] = field(default_factory=dict)
    axes: int = 0
    defined: Tensor | None = None  # False where no assignment stands: contents say nothing there

    def bind(self, variable: Variable, divisor: int, size: int, index: Tensor) -> Space:
        """The space with one digit more, or with another index for a digit that is there already."""
        known: list[tuple[int, int, Tensor]] = []
        for low, extent, other in self.digits.get(variable, ()):
            if low * extent <= divisor or divisor * size <= low:
                known.append((low, extent, other))
                continue
            if low < divisor:
                known.append((low, divisor // low, other % (divisor // low)))
            if divisor * size < low * extent:
                above = divisor * size // low
                known.append((divisor * size, extent // above, other // above))
        return replace(self, digits={**self.digits, variable: (*known, (divisor, size, index))})

    def axis(self, size: int) -> tuple[Space, Tensor]:
        """A further axis, and 0, 1, 2, ... along it."""
        if self.axes == AXES:
            raise Unknown("too many indices at once")
        shape = [1] * AXES
        shape[self.axes] = size
        return replace(self, axes=self.axes + 1), torch.arange(size).view(shape)

    def digit(self, atom: Atom, divisor: int, size: int) -> Tensor:
        """One digit of a variable, put together from those that are fixed."""
        if size == 1:
            return torch.zeros([1] * AXES, dtype=torch.long)
        known = sorted(self.digits.get(atom.variable, ()), key=lambda entry: entry[0])
        if size == 0 and known:
            return known[0][2]
        reached, total = divisor, torch.zeros([1] * AXES, dtype=torch.long)
        for low, extent, index in known:
            total = total + index * low
            if low <= reached < low * extent:
                reached = low * extent
        if reached < divisor * size:
            raise Wrong(f"{atom} is an index that runs along no dimension")
        return total // divisor % max(size, 1)


class Logged(dict[fx.Node, Any]):
    """Remembers every entry that was ever made, and how far the walk had come."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, fx.Node, Any]] = []
        self.clock: set[fx.Node] = set()

    def __setitem__(self, node: fx.Node, value: Any) -> None:
        self.entries.append((len(self.clock), node, value))
        super().__setitem__(node, value)


# ---- terms


class Oracle:
    """Evaluates terms, given the tensors that leaves are.

    `leaves` holds each node's tensor as it was made, and (node, writer) as it was after a write.
    """

    def __init__(self, state: Interpretation, leaves: dict[Any, Tensor], sizes: dict[Any, int]) -> None:
        self.state, self.leaves, self.sizes = state, leaves, sizes

    def size(self, size: Any) -> int:
        """A size as a number."""
        if isinstance(size, int):
            return size
        found = size.subs(self.sizes)
        if not found.is_number:
            raise Unknown(f"size {size}")
        return int(found)

    def digit(self, atom: Atom, space: Space) -> Tensor:
        """An atom's digit."""
        divisor, size = self.size(atom.divisor), self.size(atom.size)
        if atom.variable.kind in ("order", "rows") and atom.variable not in space.digits:
            return self.number_in(atom.variable, space) // divisor % max(size, 1)
        return space.digit(atom, divisor, size)

    def number_in(self, variable: Variable, space: Space) -> Tensor:
        """The place of an assignment among those that an order or a choice of rows lists; any if it is not listed."""
        listed = self.enumerated(variable)
        number = torch.zeros(self.extent(variable.group), dtype=torch.long)
        number[listed] = torch.arange(len(listed))
        return number[self.number(variable.group, space)]

    def number(self, parts: Sequence[Part], space: Space) -> Tensor:
        """Indices in mixed radix as one number, the first the most significant."""
        flat = torch.zeros([1] * AXES, dtype=torch.long)
        for part in parts:
            flat = flat * self.size(extent_of(part)) + self.part(part, space)
        return flat

    def extent(self, group: Sequence[Part]) -> int:
        """How many numbers indices in mixed radix make."""
        return torch.Size([self.size(extent_of(part)) for part in group]).numel()

    def element(self, value: Value, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """All elements of a value, and where it says anything."""
        if isinstance(value.content, terms.Special) and value.content.kind == "written":
            raise Unknown("written")
        if len(value.dims) != len(shape):
            raise Wrong(f"{len(value.dims)} dimensions of {len(shape)}")
        space = Space()
        for group, extent in zip(value.dims, shape, strict=True):
            space, index = space.axis(extent)
            space = self.along(group, index, extent, space)
        space = self.derived(space)
        full = [*shape, *[1] * (AXES - len(shape))]
        content = value.content
        if isinstance(content, terms.Special) and content.kind in WHOLE:
            found, defined = WHOLE[content.kind](self, content.about, space, shape)
        else:
            found, defined = self.content(content, space), space.defined
        return found.expand(full).reshape(shape), None if defined is None else defined.expand(full).reshape(shape)

    def along(self, group: Group, index: Tensor, extent: int, space: Space) -> Space:
        """The digits of a group, whose flat index is `index`."""
        sizes = [self.size(atom.size) for atom in group] if len(group) > 1 else [extent] * len(group)
        if group and torch.Size(sizes).numel() != extent:
            raise Wrong(f"a dimension of {extent} that runs over {sizes}")
        for atom, size in zip(reversed(group), reversed(sizes), strict=True):
            space = space.bind(atom.variable, self.size(atom.divisor), size, index % max(size, 1))
            index = index // max(size, 1)
        return space

    def derived(self, space: Space) -> Space:
        """What rows in an order say of the assignments they are."""
        for variable, known in list(space.digits.items()):
            derive = DERIVED.get(variable.kind)
            if derive is not None:
                atom = Atom(variable, 1, max(low * extent for low, extent, _ in known))
                space = derive(self, variable, space.digit(atom, 1, int(atom.size)), space)
        return space

    def enumerated(self, variable: Variable) -> Tensor:
        """The assignments that an order or a choice of rows lists, one after another."""
        group, by = variable.group, variable.by
        assert by is not None
        key, size = variable.key, self.extent(group)
        by_assignment = self.flat(by, group, size)
        if variable.kind == "order":
            order = self.leaves.get((key, "order"))
            if order is None:
                return by_assignment.argsort(stable=True)
            if sorted(order.tolist()) != list(range(size)) or not bool(by_assignment[order].diff().ge(0).all()):
                raise Wrong(f"{variable} is not sorted by its key")
            return order
        chosen = by_assignment.nonzero().flatten()
        if isinstance(key, tuple):  # the pieces of a sorted order
            order = self.enumerated(key[0].variable)
            return order[by_assignment[order] != 0]
        call = self.state.calls[key]
        mask = self.before(call["input"] if call.name == "nonzero" else call["condition"], key)
        space = self.along(group, chosen.view(-1, *[1] * (AXES - 1)), size, Space(axes=1))
        flat = self.number([atom for dim in mask.dims for atom in dim], space)  # as the mask's elements lie
        return chosen[flat.expand(len(chosen), *[1] * (AXES - 1)).flatten().argsort(stable=True)]

    def before(self, node: fx.Node, reader: fx.Node) -> Value:
        """The meaning that a tensor had when it was read."""
        assert isinstance(self.state.values, Logged)
        time = list(self.state.graph.nodes).index(reader) + 1
        found = [value for at, name, value in self.state.values.entries if name is node and at <= time]
        return found[-1]

    def flat(self, content: Content, group: Group, size: int) -> Tensor:
        """A content along the flat index of a group."""
        space, index = Space().axis(size)
        space = self.derived(self.along(group, index, size, space))
        return self.content(content, space).expand(size, *[1] * (AXES - 1)).flatten()

    def part(self, part: Part, space: Space) -> Tensor:
        """An index into a dimension."""
        if isinstance(part, Atom):
            return self.digit(part, space)
        if isinstance(part, terms.Affine):
            return part.start + part.step * self.digit(part.atom, space)
        if isinstance(part, terms.Fixed):
            return torch.full([1] * AXES, part.index)
        found = self.content(part.content, space).long()
        extent = self.size(part.extent)
        if bool((found >= extent).any()) or bool((found < -extent).any()):
            raise Unknown("an index out of range")  # eager fails, or reads what nobody may
        return found % extent

    def leaf(self, element: terms.Element) -> Tensor:
        """The leaf an element is taken from, flat."""
        if isinstance(element.root, terms.Stacked):
            return torch.stack([self.leaves[node].reshape(-1) for node in element.root.nodes]).flatten()
        made = LEAVES.get(type(element.root))
        if made is not None:
            found: Tensor = made(self, element.root)
            return found
        key = element.root if element.written is None else (element.root, element.written)
        if key not in self.leaves:
            raise Unknown(f"leaf {key}")
        return self.leaves[key].reshape(-1)

    def content(self, content: Content, space: Space) -> Tensor:
        """A content in float64, at every index of the space."""
        if sum(1 for _ in space.digits) and torch.broadcast_shapes(*self._shapes(space)).numel() > LIMIT:
            raise Unknown("too large")
        evaluate = CONTENTS.get(type(content))
        if evaluate is None:
            raise Unknown(type(content).__name__)
        found: Tensor = evaluate(self, content, space)
        return found

    @staticmethod
    def _shapes(space: Space) -> list[torch.Size]:
        return [index.shape for known in space.digits.values() for _, _, index in known]

    def summed(self, content: Content, over: Group, space: Space) -> Tensor:
        """The sum of a content over digits."""
        first = space.axes
        for atom in over:
            size = self.size(atom.size)
            space, index = space.axis(size)
            space = space.bind(atom.variable, self.size(atom.divisor), size, index)
        found = self.content(content, space)
        for number, atom in enumerate(over):  # what does not depend on a digit is there as often
            if found.shape[first + number] == 1:
                found = found * self.size(atom.size)
        axes = list(range(first, space.axes))
        return found.sum(axes, keepdim=True) if axes else found


def _listed(oracle: Oracle, variable: Variable, number: Tensor, space: Space) -> Space:
    """The assignment that a row of an order, or of a choice of rows, is."""
    listed = oracle.enumerated(variable)
    if number.numel() and int(number.max()) >= len(listed):
        raise Wrong(f"{len(listed)} rows of which number {int(number.max())} is named")
    return oracle.along(variable.group, listed[number], oracle.extent(variable.group), space)


DERIVED: dict[str, Any] = {"order": _listed, "rows": _listed}


def _element(oracle: Oracle, content: terms.Element, space: Space) -> Tensor:
    flat = oracle.number(content.index, space)
    leaf = oracle.leaf(content).double()
    return leaf[flat] if leaf.numel() else torch.zeros([1] * AXES, dtype=torch.float64)


def _index(oracle: Oracle, content: terms.Index, space: Space) -> Tensor:
    return oracle.number(content.atoms, space).double()


def _apply(oracle: Oracle, content: terms.Apply, space: Space) -> Tensor:
    arguments = [oracle.content(argument, space) for argument in content.args]
    if content.op == "cast":
        return arguments[0].to(getattr(torch, content.params[0])).double()
    function = getattr(torch, content.op, None) or getattr(torch.nn.functional, content.op)
    found: Tensor = (
        function(*arguments, *content.params)
        if content.op != "gelu"
        else torch.nn.functional.gelu(arguments[0], approximate=content.params[0])
    )
    return found


def _contract(oracle: Oracle, content: terms.Contract, space: Space) -> Tensor:
    return oracle.summed(terms.Apply("mul", (content.left, content.right)), (content.over,), space)


def _equals(oracle: Oracle, content: terms.Equals, space: Space) -> Tensor:
    return (oracle.content(content.content, space) == oracle.part(content.atom, space)).double()


def assignments(content: Content) -> Group:
    """All digits that expert ids are indexed by."""
    if not isinstance(content, terms.Element) or not all(isinstance(part, Atom) for part in content.index):
        raise Unknown("counts of something that is no leaf")
    return tuple(part for part in content.index if isinstance(part, Atom))


def counts(oracle: Oracle, key: Content, num_experts: Any) -> Tensor:
    """How many of all elements of a key equal each expert."""
    group = assignments(key)
    ids = oracle.flat(key, group, oracle.extent(group))
    assert isinstance(key, terms.Element)
    known = key.written is None and key.root in oracle.state.id_ranges
    if ids.numel() and int(ids.max()) >= oracle.size(num_experts) and not known:
        raise Unknown("ids beyond the experts")  # eager's counts are longer then, and no grouped GEMM takes them
    return torch.stack([(ids == expert).sum() for expert in range(oracle.size(num_experts))]).double()


def _count(oracle: Oracle, content: terms.Count | terms.Offsets, space: Space) -> Tensor:
    found = counts(oracle, content.key, content.num_experts)
    return along_experts(found.cumsum(0) if isinstance(content, terms.Offsets) else found, space)


def along_experts(found: Tensor, space: Space) -> Tensor:
    """One number an expert, along the only dimension there is."""
    indices = [index for known in space.digits.values() for _, size, index in known if size != 1]
    if len(found) == 1:
        return found.view([1] * AXES)
    if len(indices) != 1 or int(indices[0].max()) != len(found) - 1:
        raise Unknown("numbers that lie otherwise than one an expert")  # whoever reads them asks `per_expert`
    return found[indices[0]]


def _total(oracle: Oracle, content: terms.Total, space: Space) -> Tensor:
    """A sum; assignments that were dropped add nothing."""
    found = (keep(inner) for keep in KEPT for inner in interpret.walk(content.content))
    kept = next((keep for keep in found if keep is not None), None)
    if kept is None and any(atom.variable.key == "assignment" for atom in content.over):
        raise Unknown("a sum without experts, of which some are dropped")
    inner = content.content if kept is None else terms.Apply("mul", (kept, content.content))
    return oracle.summed(inner, content.over, space)


def _constant(oracle: Oracle, content: terms.Constant, space: Space) -> Tensor:
    return torch.full([1] * AXES, float(content.value), dtype=torch.float64)


def _special(oracle: Oracle, content: terms.Special, space: Space) -> Tensor:
    evaluate = SPECIALS.get(content.kind)
    if evaluate is None:
        raise Unknown(content.kind)
    found: Tensor = evaluate(oracle, content.about, space)
    return found


# of forms that drop assignments: a content -> 1 where it speaks of one that was kept, or None
KEPT: list[Callable[[Content], Content | None]] = []
# leaves that are no node of the graph: their type -> (oracle, root) -> elements, flat
LEAVES: dict[type, Any] = {}
# of contents that say for themselves where they are defined: (oracle, about, space, shape) -> elements, defined
WHOLE: dict[str, Any] = {}
# contents that only one form has: their kind -> (oracle, about, space) -> elements
SPECIALS: dict[str, Any] = {}
CONTENTS: dict[type, Any] = {
    terms.Element: _element,
    terms.Index: _index,
    terms.Constant: _constant,
    terms.Apply: _apply,
    terms.Contract: _contract,
    terms.Equals: _equals,
    terms.Count: _count,
    terms.Offsets: _count,
    terms.Total: _total,
    terms.Special: _special,
}
