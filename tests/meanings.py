"""An oracle for detection: what a meaning says of a tensor, computed from the leaves, against what the tensor holds.

A rule that gives a wrong meaning is a wrong rewrite waiting for a graph in which nothing else objects. So every meaning
that the interpretation of a graph ever holds is evaluated as passes/terms.py defines it, with plain loops over index
variables in float64, and compared with the tensor that the graph computes at that point of the program.

    lies = check_meanings(gm, inputs)        # [] if every meaning is true
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from moecompile.passes import interpret, terms
from moecompile.passes.aliases import fake_of, tensors_in
from moecompile.passes.interpret import Interpretation
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
        number = torch.zeros(torch.Size([self.size(atom.size) for atom in variable.group]).numel(), dtype=torch.long)
        number[listed] = torch.arange(len(listed))
        flat = torch.zeros([1] * AXES, dtype=torch.long)
        for atom in variable.group:
            flat = flat * self.size(atom.size) + self.digit(atom, space)
        return number[flat]

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
        key, size = variable.key, torch.Size([self.size(atom.size) for atom in group]).numel()
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
        flat = torch.zeros([1] * AXES, dtype=torch.long)
        for atom in (atom for dim in mask.dims for atom in dim):  # in the order that the mask's elements lie in
            flat = flat * self.size(atom.size) + self.digit(atom, space)
        return chosen[flat.expand(len(chosen), *[1] * (AXES - 1)).flatten().argsort(stable=True)]

    def before(self, node: fx.Node, reader: fx.Node) -> Value:
        """The meaning that a tensor had when it was read."""
        assert isinstance(self.state.values, _Logged)
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
    sizes = [oracle.size(digit.size) for digit in variable.group]
    return oracle.along(variable.group, listed[number], torch.Size(sizes).numel(), space)


DERIVED: dict[str, Any] = {"order": _listed, "rows": _listed}


def _element(oracle: Oracle, content: terms.Element, space: Space) -> Tensor:
    flat = torch.zeros([1] * AXES, dtype=torch.long)
    for part in content.index:
        extent = oracle.size(part.size if isinstance(part, Atom) else part.extent)
        flat = flat * extent + oracle.part(part, space)
    return oracle.leaf(content).double()[flat]


def _index(oracle: Oracle, content: terms.Index, space: Space) -> Tensor:
    flat = torch.zeros([1] * AXES, dtype=torch.long)
    for atom in content.atoms:
        flat = flat * oracle.size(atom.size) + oracle.digit(atom, space)
    return flat.double()


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
    ids = oracle.flat(key, group, torch.Size([oracle.size(atom.size) for atom in group]).numel())
    assert isinstance(key, terms.Element)
    if int(ids.max()) >= oracle.size(num_experts) and key.root not in oracle.state.id_ranges:
        raise Unknown("ids beyond the experts")  # eager's counts are longer then, and no grouped GEMM takes them
    return torch.stack([(ids == expert).sum() for expert in range(oracle.size(num_experts))]).double()


def _count(oracle: Oracle, content: terms.Count | terms.Offsets, space: Space) -> Tensor:
    """One number an expert, along the only dimension there is."""
    found = counts(oracle, content.key, content.num_experts)
    found = found.cumsum(0) if isinstance(content, terms.Offsets) else found
    indices = [index for known in space.digits.values() for _, size, index in known if size != 1]
    if len(found) == 1:
        return found.view([1] * AXES)
    if len(indices) != 1 or int(indices[0].max()) != len(found) - 1:
        raise Unknown("counts that lie otherwise than one an expert")  # whoever reads them asks `per_expert`
    return found[indices[0]]


def _total(oracle: Oracle, content: terms.Total, space: Space) -> Tensor:
    """A sum; assignments that were dropped add nothing."""
    kept = next((keep for keep in map(KEPT, interpret.walk(content.content)) if keep is not None), None)
    inner = content.content if kept is None else terms.Apply("mul", (kept, content.content))
    return oracle.summed(inner, content.over, space)


def _constant(oracle: Oracle, content: terms.Constant, space: Space) -> Tensor:
    return torch.full([1] * AXES, float(content.value), dtype=torch.float64)


# ---- meanings of one form


def _special(oracle: Oracle, content: terms.Special, space: Space) -> Tensor:
    evaluate = SPECIALS.get(content.kind)
    if evaluate is None:
        raise Unknown(content.kind)
    found: Tensor = evaluate(oracle, content.about, space)
    return found


def _chosen(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    """1 where a token's ids name the expert."""
    ids, atom = about
    return oracle.summed(terms.Equals(ids.content, atom), ids.dims[1], space).clamp(max=1)


def _any(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return oracle.summed(about[0], about[1], space).clamp(max=1)


def _spread(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    return oracle.content(about[0], space) * oracle.content(about[1], space)


def _number_of_one(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    key, index, extent = about
    return counts(oracle, key, extent)[index].view([1] * AXES)


def _partial(oracle: Oracle, about: tuple[Any, ...], space: Space) -> Tensor:
    """The base, and the terms of the experts that have added theirs."""
    partial, ids, choices = about
    if not partial.fresh:
        raise Unknown("a sum added to something")
    total = torch.zeros([1] * AXES, dtype=torch.float64)
    for expert, term in partial.terms:
        mask = terms.Equals(ids, terms.Fixed(expert, partial.num_experts))
        total = total + oracle.summed(terms.Apply("mul", (mask, term)), choices, space)
    return total


def KEPT(content: Content) -> Content | None:  # replaced where a form drops assignments
    return None


# leaves that are no node of the graph: their type -> (oracle, root) -> elements, flat
LEAVES: dict[type, Any] = {}
# of contents that say for themselves where they are defined: (oracle, about, space, shape) -> elements, defined
WHOLE: dict[str, Any] = {}
SPECIALS: dict[str, Any] = {
    "chosen": _chosen,
    "not chosen": lambda oracle, about, space: 1 - _chosen(oracle, about, space),
    "any": _any,
    "spread": _spread,
    "count": _number_of_one,
    "partial": _partial,
}
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


# ---- a whole graph


@dataclass(frozen=True)
class Lie:
    """A meaning that is not what the tensor holds."""

    node: str
    operation: str
    value: Value
    what: str

    def __str__(self) -> str:
        return f"{self.operation} {self.node}: {self.what}\n    {self.value}"


@dataclass
class Checked:
    """What came of all meanings of a graph."""

    lies: list[Lie] = field(default_factory=list)
    compared: int = 0  # that say more than that a leaf is itself
    unknown: dict[str, int] = field(default_factory=dict)


class _Logged(dict[fx.Node, Any]):
    """Remembers every entry that was ever made, and how far the walk had come."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, fx.Node, Any]] = []
        self.clock: set[fx.Node] = set()

    def __setitem__(self, node: fx.Node, value: Any) -> None:
        self.entries.append((len(self.clock), node, value))
        super().__setitem__(node, value)


@dataclass
class _Watched(Interpretation):
    """An interpretation that logs its meanings."""

    def __post_init__(self) -> None:
        self.values, self.results = _Logged(), _Logged()
        self.values.clock = self.results.clock = self.seen


def watched(graph: fx.Graph) -> Interpretation:
    """`interpret`, with a log of all meanings."""
    with mock.patch.object(interpret, "Interpretation", _Watched):
        return interpret.interpret(graph)


def check_meanings(gm: fx.GraphModule, inputs: Sequence[Any], tolerance: float = 1e-4) -> Checked:
    """Runs a graph node by node, and compares every tensor with every meaning it is given at that point."""
    state = watched(gm.graph)
    return Run(gm, state, tolerance).checked(inputs)


class Run(fx.Interpreter):
    """One run of a graph beside its interpretation."""

    def __init__(self, gm: fx.GraphModule, state: Interpretation, tolerance: float) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.state, self.tolerance = state, tolerance
        self.leaves: dict[Any, Tensor] = {}
        self.sizes: dict[Any, int] = {}
        self.live: dict[fx.Node, Any] = {}
        self.found = Checked()
        self.oracle = Oracle(state, self.leaves, self.sizes)
        self.log: dict[int, list[tuple[fx.Node, Any]]] = {}
        for table in (state.values, state.results):
            assert isinstance(table, _Logged)
            for time, node, value in table.entries:
                self.log.setdefault(time, []).append((node, value))

    def checked(self, inputs: Sequence[Any]) -> Checked:
        """Runs all of it."""
        with torch.no_grad():
            self.run(*[value.detach().clone() if isinstance(value, Tensor) else value for value in inputs])
            for node, value in self.state.values.items():
                self.judge(node, value, [self.live[node]])
            self.facts()
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        """Executes a node, and judges the meanings that its rule, or its write, gave."""
        time = len(self.live) + 1
        about = self.log.get(time, [])
        before = {node: _copied(self.live[node]) for node, _ in about if node in self.live}
        result = super().run_node(n)
        self.live[n] = result
        self.learn(n, result)
        for node, value in about:
            now = self.live[node]
            held = [now, before[node]] if node in before else [now]
            if isinstance(value, tuple):
                for number, piece in enumerate(value):
                    if piece is not None:
                        self.judge(node, piece, [item[number] for item in held])
            else:
                self.judge(node, value, held)
        return result

    def learn(self, node: fx.Node, result: Any) -> None:
        """Keeps a node's tensor as a leaf, those that it wrote into as leaves after the write, and symbolic sizes."""
        fakes = tensors_in(fake_of(node))
        for fake, real in zip(fakes, tensors_in(result), strict=False):
            for size, number in zip(fake.shape, real.shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    self.sizes[size.node.expr] = number
        fake = fake_of(node)
        if isinstance(fake, torch.SymInt) and fake.node.expr.is_symbol:
            self.sizes[fake.node.expr] = int(result)
        if isinstance(result, Tensor):
            self.leaves[node] = _copied(result)
        call = self.state.calls.get(node)
        if call is not None and call.name in ("sort", "argsort"):
            order = result if isinstance(result, Tensor) else result[1]
            self.leaves[(node, "order")] = order.clone()
        if node in self.state.writers:
            for alias, tensor in (*self.live.items(), (node, result)):
                if isinstance(tensor, Tensor):
                    self.leaves[(alias, node)] = _copied(tensor)

    def judge(self, node: fx.Node, value: Value, held: Sequence[Any]) -> None:
        """Compares one meaning with what a tensor holds: right if it is what one of them is."""
        try:
            wrongs = [self.difference(value, tensor) for tensor in held if isinstance(tensor, Tensor)]
        except Unknown as reason:
            self.found.unknown[str(reason)] = self.found.unknown.get(str(reason), 0) + 1
            return
        except Wrong as reason:
            wrongs = [str(reason)]
        content = value.content
        if not (isinstance(content, terms.Element) and content.root is node):
            self.found.compared += 1
        if wrongs and all(wrongs):
            self.found.lies.append(Lie(str(node), str(node.target), value, str(wrongs[0])))

    def difference(self, value: Value, tensor: Tensor, base: Any = 0.0) -> str | None:
        """What differs where `base` is added to the meaning, or None."""
        if tensor.is_complex():
            raise Unknown("complex")
        if not tensor.numel():
            return None
        said, defined = self.oracle.element(value, tensor.shape)
        said = said + base
        actual = tensor.double()
        scale = max(1.0, float(actual[actual.isfinite()].abs().max()) if actual.isfinite().any() else 1.0)
        tolerance = max(self.tolerance, {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(tensor.dtype, 0.0))
        close = torch.isclose(said, actual, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
        if defined is not None:
            close = close | ~defined
        if bool(close.all()):
            return None
        place = tuple((~close).nonzero()[0].tolist())
        return f"holds {float(actual[place]):.5g} at {place}, where its meaning gives {float(said[place]):.5g}"

    def facts(self) -> None:
        """What is known of leaves beside their meanings."""
        for node, limit in self.state.id_ranges.items():
            ids = self.leaves[node]
            if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < limit):
                self.fact(node, f"ids outside of range({limit})")
        for node in self.state.distinct:
            rows = self.leaves[node].unsqueeze(0).flatten(0, -2).tolist()
            if any(len(set(row)) < len(row) for row in rows):
                self.fact(node, "ids that are not distinct")
        for node, sparse in self.state.sparse.items():
            self.sparse(node, sparse)
        for node, content in self.state.numbers.items():
            with_number = self.oracle.content(content, Space())
            if int(with_number) != int(self.live[node]):
                self.fact(node, f"is {self.live[node]} where {int(with_number)} was expected")
        for found in self.state.combines:
            self.combine(found)

    def sparse(self, node: fx.Node, sparse: interpret.Sparse) -> None:
        """A sparse leaf holds its outside value wherever a token's ids do not name the expert."""
        tensor = self.leaves[node]
        try:
            ids, _ = self.oracle.element(sparse.ids, (tensor.shape[0], self.extent(sparse.ids.dims[1])))
        except Unknown:
            return
        except Wrong as reason:
            return self.fact(node, str(reason))
        named = (ids.unsqueeze(-1) == torch.arange(tensor.shape[1])).any(1)
        if not bool(((tensor == sparse.outside) | named).all()):
            self.fact(node, f"is not {sparse.outside} away from the tokens' ids")
        self.found.compared += 1

    def extent(self, group: Group) -> int:
        return torch.Size([self.oracle.size(atom.size) for atom in group]).numel()

    def combine(self, found: interpret.Combine) -> None:
        """The base and the sum are what the tensor holds."""
        tensor = self.leaves.get(found.node)
        if tensor is None:  # a write without a result
            tensor = self.leaves[(self.state.writers[found.node][0], found.node)]
        base = 0.0 if found.fresh or found.base is None else self.leaves[found.base].double()
        try:
            wrong = self.difference(found.value, tensor, base)
        except Unknown as reason:
            self.found.unknown[str(reason)] = self.found.unknown.get(str(reason), 0) + 1
            return
        except Wrong as reason:
            wrong = str(reason)
        self.found.compared += 1
        if wrong:
            self.found.lies.append(Lie(str(found.node), f"the sum {found.node.target}", found.value, wrong))

    def fact(self, node: fx.Node, what: str) -> None:
        value = self.state.values.get(node) or Value((), terms.Constant(0))
        self.found.lies.append(Lie(str(node), str(node.target), value, what))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def nodes_of(lies: Sequence[Lie]) -> Iterator[str]:
    """The names of the nodes that are lied about, each once."""
    return (name for name, _ in itertools.groupby(lies, key=lambda lie: lie.node))
