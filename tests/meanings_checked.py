"""Runs a graph beside its interpretation, and compares every meaning with the tensor that it is about.

found = check_meanings(gm, inputs)
found.lies                                # [] if every meaning that the interpretation ever held is true
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from meanings import Logged, Oracle, Space, Unknown, Wrong
from moecompile.passes import interpret, radix
from moecompile.passes.aliases import fake_of, tensors_in
from moecompile.passes.interpret import Interpretation
from moecompile.passes.terms import Constant, Element, Value


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


@dataclass
class _Watched(Interpretation):
    """An interpretation that logs its meanings."""

    def __post_init__(self) -> None:
        self.values, self.results = Logged(), Logged()
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
            assert isinstance(table, Logged)
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
            for tensor in held:
                self.check_shape(fake_of(node), tensor)
            wrongs = [self.difference(value, tensor) for tensor in held if isinstance(tensor, Tensor)]
        except Unknown as reason:
            self.found.unknown[str(reason)] = self.found.unknown.get(str(reason), 0) + 1
            return
        except Wrong as reason:
            wrongs = [str(reason)]
        content = value.content
        if not (isinstance(content, Element) and content.root is node):
            self.found.compared += 1
        if wrongs and all(wrongs):
            self.found.lies.append(Lie(str(node), str(node.target), value, str(wrongs[0])))

    def check_shape(self, fake: Any, tensor: Any) -> None:
        """Sizes that only the data tells are taken to agree where tensors meet; a compiled model checks it."""
        if isinstance(fake, Tensor) and isinstance(tensor, Tensor):
            sizes = [self.oracle.size(radix.size_of(size)) for size in fake.shape]
            if sizes != list(tensor.shape):
                raise Unknown("another shape than the example value's")

    def difference(self, value: Value, tensor: Tensor, base: Any = 0.0) -> str | None:
        """What differs where `base` is added to the meaning, or None."""
        if tensor.is_complex():
            raise Unknown("complex")
        if not tensor.numel():
            return None
        said, defined = self.oracle.element(value, tensor.shape)
        said = (said + base).to(tensor.dtype).double() if tensor.is_floating_point() else said + base
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
            ids, _ = self.oracle.element(sparse.ids, (tensor.shape[0], self.oracle.extent(sparse.ids.dims[1])))
        except Unknown:
            return
        except Wrong as reason:
            return self.fact(node, str(reason))
        named = (ids.unsqueeze(-1) == torch.arange(tensor.shape[1])).any(1)
        if not bool(((tensor == sparse.outside) | named).all()):
            self.fact(node, f"is not {sparse.outside} away from the tokens' ids")
        self.found.compared += 1

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
        value = self.state.values.get(node) or Value((), Constant(0))
        self.found.lies.append(Lie(str(node), str(node.target), value, what))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
