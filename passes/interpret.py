"""Walk a graph once, in order, and give every tensor its meaning.

Contract
- Every rule is exact: it says what its result is, or refuses. Nothing is guessed; a tensor without a rule is a leaf,
  which means only itself.
- Mutations happen in program order. A write through one name changes the meaning of every name of the same elements;
  any other alias of the written memory becomes a new leaf, so that no stale meaning survives.
- The graph is not changed. The result is one `Interpretation`.

    for node in graph:                       # program order
        call  = bind(node)                   # canonical name, or none
        value = RULES[call.name](call)       # a meaning, or a reason why there is none
        if the node writes: give every alias its new meaning

- Most of a model is no MoE block: floating-point leaves that are computed with or rearranged. Arithmetic with them is
  another leaf, and a view of one is looked at when somebody asks for it, or before something writes into its source.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moecompile.passes import radix, terms
from moecompile.passes.aliases import Aliases, fake_of, tensors_in
from moecompile.passes.calls import Call, bind, writes
from moecompile.passes.spelling import not_understood
from moecompile.passes.terms import Atom, Constant, Content, Element, Size, Value, Variable

if TYPE_CHECKING:
    from moecompile.passes.site import Spread


class Refused(Exception):
    """Something is not what a rule, or a form, is about.

    The message says why; `node` is the tensor that it is about, if there is one.
    """

    def __init__(self, message: str, node: fx.Node | None = None) -> None:
        super().__init__(message)
        self.node = node


class Passed(Exception):
    """A form's own rule does not concern an operation: the general rule decides."""


@dataclass(frozen=True)
class Combine:
    """A node where expert outputs are summed into tokens: what detection builds Sites from."""

    node: fx.Node
    value: Value  # content is a Total, or a Special sum of partial results
    base: fx.Node | None = None  # what the sum is added to
    fresh: bool = True  # the base is zeros, or there is none
    partials: tuple[fx.Node, ...] = ()  # the additions that made it, where it took several


@dataclass(frozen=True)
class Sparse:
    """A leaf of shape (tokens, experts) that holds `outside` wherever a token's `ids` do not name the expert."""

    ids: Value  # dims (token), (choice); content: the expert id
    outside: float | int


Rule = Callable[[Call, "Interpretation"], "Value | tuple[Value | None, ...] | None"]


@dataclass
class Interpretation:
    """Meanings of all tensors of one graph after a walk through it."""

    graph: fx.Graph
    aliases: Aliases
    values: dict[fx.Node, Value] = field(default_factory=dict)
    made: dict[fx.Node, Value] = field(default_factory=dict)  # as `values`, of tensors as they were made: no write
    results: dict[fx.Node, tuple[Value | None, ...]] = field(default_factory=dict)
    refusals: dict[fx.Node, str] = field(
        default_factory=dict
    )  # operations on routed rows that no rule explains, in program order
    combines: list[Combine] = field(default_factory=list)
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    sparse: dict[fx.Node, Sparse] = field(default_factory=dict)
    numbers: dict[fx.Node, Content] = field(default_factory=dict)  # meanings of Python numbers read off tensors
    id_ranges: dict[fx.Node, int] = field(default_factory=dict)  # leaves of expert ids that are all in range(number)
    distinct: set[fx.Node] = field(default_factory=set)  # leaves of ids that differ along their last dimension
    appended: dict[fx.Node, Value] = field(default_factory=dict)  # leaves that are these rows, and rows of zeros after
    spread: dict[fx.Node, Spread] = field(default_factory=dict)  # leaves of this rank's experts, taken as all ranks'
    seen: set[fx.Node] = field(default_factory=set)  # the nodes that were interpreted, as far as the walk has come
    writers: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)  # writing node -> the nodes it writes into
    touched: set[fx.Node] = field(default_factory=set)  # tensors, later ones too, of memory that was written into
    rules: Mapping[str, Rule] = field(default_factory=dict)  # canonical name -> rule
    deferred: dict[fx.Node, Call] = field(default_factory=dict)  # views of plain leaves that nobody has asked for yet
    quiet: set[fx.Node] = field(default_factory=set)  # floating-point leaves, and views of such, that are no gates

    def combine(self, found: Combine) -> None:
        """Notes a sum of expert outputs; Refused unless it has the shape of its tensor, or of that it is added into."""
        fake = fake_of(found.node)
        if fake is None and found.base is not None:
            fake = fake_of(found.base)
        check_shape(found.value, fake)
        content = found.value.content
        check_distinct(Value((*found.value.dims, content.over if isinstance(content, terms.Total) else ()), content))
        self.combines.append(found)

    def shape(self, node: fx.Node) -> tuple[Size, ...]:
        """The shape of the tensor at a node."""
        fake = fake_of(node)
        if not isinstance(fake, torch.Tensor):
            raise Refused(f"{node} is not a tensor")
        shape: tuple[Any, ...] = tuple(fake.shape)
        return shape if all(type(size) is int for size in shape) else tuple(map(radix.size_of, shape))

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype of the tensor at a node."""
        fake = fake_of(node)
        if not isinstance(fake, torch.Tensor):
            raise Refused(f"{node} is not a tensor")
        return fake.dtype

    def value(self, node: Any) -> Value:
        """The meaning of a tensor or number: its value, or itself as a leaf."""
        if isinstance(node, fx.Node):
            if node not in self.values:
                fake = fake_of(node)
                if not isinstance(fake, torch.Tensor):
                    raise Refused(f"{node} is not a tensor")
                deferred = self.deferred.pop(node, None)
                outcome = None if deferred is None else _outcome(deferred, self)
                self.values[node] = outcome if isinstance(outcome, Value) else self.leaf(node)
                self.made.setdefault(node, self.values[node])
            return self.values[node]
        if isinstance(node, (int, float, bool)):
            return Value((), Constant(node))
        raise Refused(f"{node!r} is neither a tensor nor a number")

    def leaf(self, node: fx.Node, written: fx.Node | None = None) -> Value:
        """The tensor as itself, or as it is after a write."""
        shape = self.shape(node)
        integral = not (self.dtype(node).is_floating_point or self.dtype(node).is_complex)
        key = node if written is None else (node, written)
        atom = Atom(Variable("ids" if integral else "leaf", key), 1, radix.product(shape))
        groups = radix.digits(atom, shape)
        if groups is None or any(size == 0 for size in shape):
            raise Refused(f"{node} has dimensions this interpretation cannot index")
        return Value(groups, Element(node, radix.merge([atom]), written))

    def sparse_leaf(self, content: Content) -> Sparse | None:
        """What is known of the gates that an element is taken from.

        None for a leaf that is no gates, or was written into since.
        """
        if isinstance(content, Element) and content.written is None and isinstance(content.root, fx.Node):
            return self.sparse.get(content.root)
        return None

    def is_unmoved(self, value: Value) -> bool:
        """Whether the value is a leaf as it lies in memory: no view that rearranges it."""
        content = value.content
        return (
            isinstance(content, Element)
            and isinstance(content.root, fx.Node)
            and value.dims == self.leaf(content.root).dims
        )

    def first_refused(self, node: fx.Node, reach: int = 60) -> fx.Node | None:
        """The first operation on the way to a tensor, writes included, that a rule refused; `reach` is in nodes."""
        seen: dict[fx.Node, None] = {}
        waiting = [node]
        while waiting and len(seen) < reach:
            found = waiting.pop(0)
            if found in seen:
                continue
            seen[found] = None
            waiting += found.all_input_nodes
            content = self.values[found].content if found in self.values else None
            if isinstance(content, Element) and content.written is not None:
                waiting.append(content.written)
        return next((found for found in self.graph.nodes if found in seen and found in self.refusals), None)

    def number(self, argument: Any) -> Size:
        """An integer argument that may be a symbolic size."""
        if isinstance(argument, fx.Node):
            argument = fake_of(argument)
        if isinstance(argument, (int, torch.SymInt)):
            return radix.size_of(argument)
        raise Refused(f"expected a number, got {argument!r}")


def is_plain(value: Value) -> bool:
    """Whether the value is a leaf or a view of one."""
    content = value.content
    if not isinstance(content, Element):
        return False
    key = content.root if content.written is None else (content.root, content.written)
    return all(isinstance(part, Atom) and part.variable.key == key for part in content.index)


def walk(content: Content) -> Iterator[Content]:
    """The content and all contents inside it, indices included."""
    yield content
    if isinstance(content, Element):
        for part in content.index:
            if isinstance(part, terms.Looked):
                yield from walk(part.content)
    elif isinstance(content, terms.Apply):
        for argument in content.args:
            yield from walk(argument)
    elif isinstance(content, terms.Contract):
        yield from walk(content.left)
        yield from walk(content.right)
    elif isinstance(content, (terms.Total, terms.Equals)):
        yield from walk(content.content)
    elif isinstance(content, terms.Meaning):
        for inner in content.inside():
            yield from walk(inner)


def is_routed(value: Value | None) -> bool:
    """Whether the value holds rows of assignments: gathered by routing, or the result of an expert's GEMM."""
    if value is None:
        return False
    return any(
        isinstance(group_atom.variable.kind, str) and group_atom.variable.rank >= 3
        for group in value.dims
        for group_atom in group
    ) or any(
        isinstance(inner, (terms.Contract, terms.Total))
        or (isinstance(inner, Element) and any(isinstance(part, terms.Looked) for part in inner.index))
        for inner in walk(value.content)
    )


def interpret(graph: fx.Graph) -> Interpretation:
    """Give every tensor of the graph its meaning. Reads meta["example_value"] (or "val"); changes nothing."""
    from moecompile.passes.rules import RULES
    from moecompile.passes.rules_arithmetic import QUIET
    from moecompile.passes.rules_routing import note_ids
    from moecompile.passes.rules_views import VIEWS

    state = Interpretation(graph, Aliases(graph), rules=RULES)
    for node in graph.nodes:
        call = bind(node) if node.op in ("call_function", "call_method") else None
        if call is not None:
            state.calls[node] = call
        state.seen.add(node)
        if call is not None and (call.name in QUIET or call.name in VIEWS) and _is_quiet(call, state):
            if call.name in VIEWS:
                state.deferred[node] = call
            continue
        outcome = None if call is None else _outcome(call, state)
        if outcome is None and call is not None:
            with contextlib.suppress(Refused):
                note_ids(call, state)
        mutates = writes(node, call)
        if isinstance(outcome, tuple):
            state.results[node] = outcome
        elif outcome is not None:
            state.values[node] = outcome
            if not mutates:
                state.made[node] = outcome
        elif (
            not mutates
            and node.op != "output"
            and (call is None or call.name not in RULES)
            and tensors_in(fake_of(node))  # a size, or a check of one, loses no meaning
            and any(is_routed(state.values.get(argument)) for argument in node.all_input_nodes)
        ):
            state.refusals.setdefault(node, not_understood(node))
        if mutates:
            state.writers[node] = state.aliases.written(node)
            _write(state, node, outcome if isinstance(outcome, Value) else None)
    return state


def _is_quiet(call: Call, state: Interpretation) -> bool:
    """Whether floating-point leaves of which nothing is known are computed with or cut: most of what a model does.

    The rules would look at it from all sides, and find a leaf.
    """
    result, arguments = fake_of(call.node), call.node.all_input_nodes
    if writes(call.node, call) or not isinstance(result, torch.Tensor) or not result.dtype.is_floating_point:
        return False
    if not all(node in state.quiet or _is_floating_leaf(node, state) for node in arguments):
        return False
    if call.name == "cast" and any(fake_of(node).dtype == result.dtype for node in arguments):
        return False
    if call.name == "getitem" and not _is_cut(call, state):
        return False
    state.quiet.add(call.node)
    return True


def _is_floating_leaf(node: fx.Node, state: Interpretation) -> bool:
    """Whether a node is a floating-point leaf or a view of one, and no gates; noted until the node is written into."""
    fake, value = fake_of(node), state.values.get(node)
    if not isinstance(fake, torch.Tensor) or not fake.dtype.is_floating_point or node in state.sparse:
        return False
    if value is not None and (not is_plain(value) or state.sparse_leaf(value.content) is not None):
        return False
    state.quiet.add(node)
    return True


def _is_cut(call: Call, state: Interpretation) -> bool:
    """Whether only some of a dimension is taken, by numbers that are known, of a tensor that no rule remembers."""
    index = call["index"] if isinstance(call["index"], tuple) else (call["index"],)
    known = all(item is None or item is Ellipsis or isinstance(item, slice) for item in index)
    return known and any(isinstance(item, slice) and item != slice(None) for item in index) and not state.appended


def _outcome(call: Call, state: Interpretation) -> Value | tuple[Value | None, ...] | None:
    rule = state.rules.get(call.name)
    if rule is None or _is_hidden(call):
        return None
    try:
        if call.name == "cast" and _keeps_all(call, state):
            return state.value(call["input"])
        outcome = rule(call, state)
        results = outcome if isinstance(outcome, tuple) else (outcome,)
        for value, fake in zip(results, _fakes(call, len(results)), strict=True):
            if value is not None:
                check_distinct(value)
                check_shape(value, fake)
        return outcome
    except (ArithmeticError, IndexError):  # an infinite number, or a tensor without dimensions: no rule is about those
        return None
    except Refused as reason:
        if any(is_routed(state.values.get(argument)) for argument in call.node.all_input_nodes):
            state.refusals[call.node] = str(reason)
        return None


def _is_hidden(call: Call) -> bool:
    """Whether a tensor is made that has no example value: inside a transform of torch.func there are none.

    (Dynamo leaves none either on the numbers that it takes out of a tensor for `tolist`.)
    """
    if fake_of(call.node) is not None or writes(call.node, call) or call.name == "getitem":
        return False
    return any(isinstance(fake_of(argument), torch.Tensor) for argument in call.node.all_input_nodes)


def _keeps_all(call: Call, state: Interpretation) -> bool:
    """Whether a cast has nothing to do."""
    before, after = (fake_of(node) if isinstance(node, fx.Node) else None for node in (call["input"], call.node))
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return (before.dtype, before.device) == (after.dtype, after.device)


def _fakes(call: Call, count: int) -> tuple[Any, ...]:
    """Example values of a call's results, or of what it writes into if it returns nothing; None if they are unknown."""
    fake = fake_of(call.node)
    if fake is None and writes(call.node, call) and isinstance(call.arguments.get("input"), fx.Node):
        fake = fake_of(call["input"])
    fakes = tuple(fake) if isinstance(fake, (tuple, list)) else (fake,)
    return fakes if len(fakes) == count else (None,) * count


def check_shape(value: Value, fake: Any) -> None:
    """A meaning has the extents of its tensor.

    What copies or adds only a part of a tensor, or spreads one over another, says so in nothing but its shape. Sizes
    that data decided are the rules' to prove.
    """
    if not isinstance(fake, torch.Tensor):
        return
    extents = tuple(radix.group_size(group) for group in value.dims)
    if len(extents) == fake.dim() and all(map(_agree, extents, fake.shape)):
        return
    raise Refused(f"a part of a tensor, or one spread over more: {tuple(fake.shape)} where its operands give {extents}")


def _agree(extent: Size, size: Any) -> bool:
    difference = radix.difference(extent, radix.size_of(size))
    return difference == 0 or (difference is None and bool(free_unbacked_symbols(size)))


def check_distinct(value: Value) -> None:
    """No index may run along two dimensions at once: such a tensor would be a diagonal, not what the terms say.

    Nor may two dimensions list the same assignments, each in an order of its own: contents could mean either's.
    """
    orders: list[Atom] = []
    digits: list[Atom] = []
    for group in value.dims:
        for atom in group:
            if atom.variable.group:
                orders.append(atom)
                digits += atom.variable.group
            else:
                digits.append(atom)
    for atoms in (digits, orders):
        for number, first in enumerate(atoms):
            for second in atoms[number + 1 :]:
                if radix.overlap(first, second):
                    raise Refused("one index along two dimensions")


def _write(state: Interpretation, node: fx.Node, value: Value | None) -> None:
    """Give the written tensor, and all names of the same elements, the new meaning.

    Every other alias becomes a new leaf.
    """
    aliases = state.aliases
    for target in state.writers[node]:
        names = aliases.of(target)
        state.touched.update(names)
        state.quiet.difference_update(names)
        for alias in names:  # what was made of the tensor as it was
            for user in [user for user in alias.users if user in state.deferred]:
                with contextlib.suppress(Refused):
                    state.value(user)
        for alias in names:
            if alias not in state.seen:
                continue
            if value is not None and aliases.same_elements(alias, target):
                state.values[alias] = value
            else:
                state.values[alias] = _written_leaf(state, alias, node)
                state.results.pop(alias, None)
        state.values[target] = value if value is not None else _written_leaf(state, target, node)


def _written_leaf(state: Interpretation, node: fx.Node, writer: fx.Node) -> Value:
    """The tensor as it is after the write: not the same leaf as before it."""
    try:
        return state.leaf(node, writer)
    except Refused:
        return Value((), terms.Special("written", (node, writer)))
