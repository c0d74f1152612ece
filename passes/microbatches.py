"""Split a graph's batch into two micro-batches, whose communication then hides behind each other's computation.

Contract
- On entry the graph is one of Dynamo's, after all other passes; its batch is a symbol, a dimension of inputs.
- What may run on halves is proven on the operators that the graph is traced to (`moecompile.passes.batch_rows`), and
  the batch of this call is even; or the reason is given.
- What comes back is a graph that runs these operations once for each half, joins what others read, and runs all others
  as before: heads, losses, statistics of the whole batch. The halves' exchanges are of half the tokens, in slots of
  their own. AOTAutograd traces it like any other: forward and backward both hold two independent bodies.

    meanings = of the values of all nodes, from the traced operators
    halved = nodes whose values are proven, as are those of all that they read
    for half in 0, 1:  the halved nodes, of x.chunk(2, dim)[half] for inputs that have the batch, B / 2 for the batch
    values that hold it and are read by others:  cat(both halves, dim)
    the other nodes, in their order
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from moecompile.passes.batch_meanings import INSIDE, SHARED, Meaning, Mixed, NotProvenError, Numbered, Rows
from moecompile.passes.batch_rows import meanings_of
from moecompile.passes.costs import expression
from moecompile.passes.expert_parallel import is_local_part
from moecompile.passes.purposes import ancestors
from moecompile.runtime.peer_memory import ROWS_AT_LEAST

aten, ops = torch.ops.aten, torch.ops.moecompile
HALVES = 2
LEAST = 4
"""Elements of a batch: a half has two or more, as a batch of any size has to traced operators."""
WAYS = 2
"""There and back: slots of one block's exchange. Of a half all blocks have the same two, as they follow each other."""
CONTEXTS = {
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
}
"""What changes how the following is run, for halves and for the rest."""
NUMBERS = (int, float, bool, torch.dtype, torch.device, torch.layout, torch.memory_format, str)


@dataclasses.dataclass(frozen=True)
class Split:
    """What became of a graph.

    Attributes:
        graph: runs on halves what may.
        exchanges: that it does twice now, of half the tokens each.
        whole: why the rest stays as it was.
        operators: `operators_of` that graph.
    """

    graph: fx.GraphModule
    exchanges: int
    whole: tuple[str, ...]
    operators: fx.Graph


def split(gm: fx.GraphModule) -> Split:
    """A graph of the same inputs and outputs that computes halves.

    Args:
        gm: as the contract has it, with example values of its inputs; it stays as it is.

    Raises:
        NotProvenError: why it stays whole.
    """
    inputs = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    batch, hint = _batch_of(inputs)
    _check_contexts(gm.graph)
    seen = _traced(gm, batch)
    halved = _halved(gm.graph, seen)
    begun = [node for node in halved if node.target is ops.dispatch_start.default]
    why = dict.fromkeys(each.reason for node in _live(gm.graph) if isinstance(each := seen.meaning.get(node), Mixed))
    writer = _Halves(gm.graph, seen, halved, batch)
    made = fx.GraphModule(gm, writer.graph())
    operators = _with_checked_sizes(made, writer, batch, hint)
    return Split(made, len(begun), tuple(why), operators)


def _with_checked_sizes(made: fx.GraphModule, writer: _Halves, batch: sympy.Symbol, hint: int) -> fx.Graph:
    """What it is traced to; all that halves make is as large as the same of the whole, of a batch half as large.

    A number of the batch that has only decided how much is taken of something else (`x[:, :len(x)]`) is in no operator.
    """
    own, stands_for = _to_be_traced(made)
    watched = _Watched(own)
    graph = _operators(watched.run, own)
    graph.eliminate_dead_code()
    found = {stands_for[node]: _shapes(watched.left[node.name]) for node in watched.nodes}
    for half in writer.of_half:
        for node in writer.halved:
            if writer.seen.meaning[node] is INSIDE:
                continue  # as large as the capacity has it
            expected = [[size.subs(batch, hint // HALVES) for size in shape] for shape in writer.seen.shapes[node]]
            if [[size.subs(batch, hint) for size in shape] for shape in found[half[node]]] != expected:
                raise NotProvenError(f"{node.name} would have other sizes in a half")
    return graph


def _shapes(tensors: Sequence[Tensor]) -> list[list[sympy.Expr]]:
    return [[expression(size) for size in each.shape] for each in tensors]


def _check_contexts(graph: fx.Graph) -> None:
    """What follows finds what there was before: so may the second half."""
    switched = [node.args[0] for node in graph.nodes if node.target is torch._C._set_grad_enabled]
    if switched and switched[-1] != torch.is_grad_enabled():
        raise NotProvenError("it switches gradients on or off, and leaves them so")


def _live(graph: fx.Graph) -> list[fx.Node]:
    """What results are made of, in order."""
    (output,) = graph.find_nodes(op="output")
    found = ancestors(output.all_input_nodes)
    return [node for node in graph.nodes if node in found]


def _batch_of(inputs: Sequence[Any]) -> tuple[sympy.Symbol, int]:
    """The symbol that is the first dimension of most of the inputs that have one there; and its number, even."""
    firsts = [each.shape[0] for each in inputs if isinstance(each, Tensor) and each.dim()]
    found: dict[Any, list[Any]] = {}
    for size in firsts:
        if isinstance(size, torch.SymInt) and isinstance(expression(size), sympy.Symbol):
            found.setdefault(expression(size), []).append(size)
    if not found:
        raise NotProvenError("its batch is a number: call moecompile.mark_batch(inputs) before the first call")
    batch, (size, *_) = max(found.items(), key=lambda item: len(item[1]))
    hint = size.node.hint
    if hint is None or hint % HALVES:
        raise NotProvenError(f"a batch of {hint} has no halves")
    if hint < LEAST:
        raise NotProvenError(f"a batch of {hint} has halves of one element, whose dimension operators may leave out")
    torch._check(size % HALVES == 0)  # else it is compiled once more, and stays whole
    torch._check(size >= LEAST)
    return batch, int(hint)


@dataclasses.dataclass
class _Seen:
    """Of Dynamo's nodes.

    Attributes:
        given: inputs' meanings.
        meaning: of what it has become when all has run; None of what has no tensors.
        written: it is written after it has been made.
        numbers: it gives numbers alone.
        shapes: of the tensors that it gives.
    """

    given: dict[fx.Node, Meaning] = dataclasses.field(default_factory=dict)
    meaning: dict[fx.Node, Meaning | None] = dataclasses.field(default_factory=dict)
    written: set[fx.Node] = dataclasses.field(default_factory=set)
    numbers: set[fx.Node] = dataclasses.field(default_factory=set)
    shapes: dict[fx.Node, list[list[sympy.Expr]]] = dataclasses.field(default_factory=dict)


def _traced(gm: fx.GraphModule, batch: sympy.Symbol) -> _Seen:
    """What its operators make of the batch, as they are without autograd."""
    own, stands_for = _to_be_traced(gm)
    watched = _AllGiven(own)
    graph = _operators(watched.all_values, own)
    meanings, seen = meanings_of(graph, batch), _Seen()
    (output,) = graph.find_nodes(op="output")
    for node, (clones, left, numbers) in zip(watched.nodes, output.args[0], strict=True):
        original, made = stands_for[node], [each.args[0] for each in clones]
        found = [meanings[each] for each in (*made, *left, *numbers) if isinstance(each, fx.Node)]
        seen.meaning[original] = _together(found, len(left))
        seen.shapes[original] = _shapes(watched.left[node.name])
        if node.op == "placeholder" and made:
            seen.given[original] = meanings[made[0]]
        if made != left:
            seen.written.add(original)
        if node.name in watched.of_numbers:
            seen.numbers.add(original)
    return seen


def operators_of(gm: fx.GraphModule) -> fx.Graph:
    """ATen's and moecompile's operators, functional and without autograd, that a graph of Dynamo's is traced to.

    Raises:
        NotProvenError: it cannot be traced.
    """
    own, _ = _to_be_traced(gm)
    graph = _operators(own, own)
    graph.eliminate_dead_code()
    return graph


def _operators(run: Callable[..., Any], gm: fx.GraphModule) -> fx.Graph:
    """What this runs, given what the graph is."""
    inputs = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    try:
        with torch.no_grad():
            traced = make_fx(dispatch_functionalize(run), tracing_mode="symbolic", _allow_non_fake_inputs=True)
            return traced(*inputs).graph
    except Exception as error:  # of whatever is in the graph
        raise NotProvenError(f"it cannot be traced with fake tensors: {type(error).__name__}: {error}") from error


def _together(found: Sequence[Meaning], tensors: int) -> Meaning | None:
    """Of all that a node gives. What gives several is read by its parts alone."""
    if mixed := [each for each in found if isinstance(each, Mixed)]:
        return mixed[0]
    if not tensors:
        return None
    return found[0] if {*found} == {SHARED} or (tensors == 1 and len({*found}) == 1) else INSIDE


class _Watched(fx.Interpreter):
    """Holds the tensors that nodes give, as they are left."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.nodes = [node for node in gm.graph.nodes if node.op != "output"]
        self.left = dict[str, list[Tensor]]()

    def run_node(self, n: fx.Node) -> Any:
        """As it is."""
        value = super().run_node(n)
        self.left[n.name] = [each for each in tree_leaves(value) if isinstance(each, Tensor)]
        return value


class _AllGiven(_Watched):
    """Gives what all nodes give: tensors as they were made, as they were left, and numbers."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.made = dict[str, list[Tensor]]()
        self.numbers = dict[str, list[Any]]()
        self.of_numbers = set[str]()

    def all_values(self, *inputs: Any) -> list[Any]:
        """In the order of the nodes."""
        self.run(*inputs)
        return [(self.made[node.name], self.left[node.name], self.numbers[node.name]) for node in self.nodes]

    def run_node(self, n: fx.Node) -> Any:
        """As it is; what it gives is held."""
        value = super().run_node(n)
        leaves, tensors = tree_leaves(value), self.left[n.name]
        numbers = [each for each in leaves if isinstance(each, (torch.SymInt, torch.SymFloat, torch.SymBool))]
        if leaves and not tensors and all(isinstance(each, (*NUMBERS, *map(type, numbers))) for each in leaves):
            self.of_numbers.add(n.name)
        self.made[n.name], self.numbers[n.name] = [each.clone() for each in tensors], numbers
        return value


def _to_be_traced(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """The graph with inputs for what ranks hold of spread parameters; and what its nodes stand for."""
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, copies))
    stands_for = {made: node for node, made in copies.items()}
    for node in graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        graph.erase_node(node)  # what is traced has no gradients
    for node in graph.find_nodes(op="placeholder"):
        if not is_traceable_wrapper_subclass(node.meta["example_value"]):
            continue
        for user in [*node.users]:
            if not is_local_part(user):
                raise NotProvenError(f"{node.name} is spread over ranks and computed with as a whole")
            with graph.inserting_after(node):
                held = graph.placeholder(f"{user.name}_held")
            held.meta["example_value"] = user.meta["example_value"]
            stands_for[held] = stands_for[user]
            user.replace_all_uses_with(held)
            graph.erase_node(user)
        graph.erase_node(node)
    return fx.GraphModule(gm, graph), stands_for


def _halved(graph: fx.Graph, seen: _Seen) -> set[fx.Node]:
    """What runs once for each half: nodes that give a tensor, or write to one."""
    halved = set[fx.Node]()
    for node in graph.nodes:
        if node.op in ("output", "placeholder") or node in seen.numbers or node.target in CONTEXTS:
            continue
        meaning = seen.meaning[node]
        tensors = [each for each in _read(node, seen) if each.op != "placeholder"]
        if meaning is None and not _read(node, seen):
            continue  # checks of numbers
        if not isinstance(meaning, Mixed) and all(each in halved for each in tensors) and _numbers_hold(node, seen):
            halved.add(node)
    _keep_blocks_together(graph, seen, halved)
    for node in graph.nodes:
        given = node.op in ("placeholder", "get_attr")
        if given and node in seen.written and not isinstance(seen.meaning[node], Mixed):
            raise NotProvenError(f"it writes into what it is given: {node.name}")
    for node in _crossing(graph, seen, halved):
        if node in seen.written:
            raise NotProvenError(f"{node.name} is written in place, and read by what stays whole")
    return halved


def _read(node: fx.Node, seen: _Seen) -> list[fx.Node]:
    """The tensors that it reads, directly or for their sizes."""
    found = dict.fromkeys(each for each in node.all_input_nodes if each not in seen.numbers)
    for each in node.all_input_nodes:
        if each in seen.numbers and each.op != "placeholder":
            found |= dict.fromkeys(_read(each, seen))
    return [*found]


def _numbers_hold(node: fx.Node, seen: _Seen) -> bool:
    """Whether no number that it reads comes from what rows hold."""
    numbers = [each for each in node.all_input_nodes if each in seen.numbers]
    return all(not isinstance(seen.meaning[each], Mixed) and _numbers_hold(each, seen) for each in numbers)


def _crossing(graph: fx.Graph, seen: _Seen, halved: set[fx.Node]) -> list[fx.Node]:
    """What runs on halves and is read by what does not."""
    others = (node for node in graph.nodes if node not in halved and node not in seen.numbers)
    return [*dict.fromkeys(each for node in others for each in _read(node, seen) if each in halved)]


def _keep_blocks_together(graph: fx.Graph, seen: _Seen, halved: set[fx.Node]) -> None:
    """What is inside of a block, or numbers, cannot be joined: if others read it, it stays whole, with what follows."""

    def joins(node: fx.Node) -> bool:
        return seen.meaning[node] is not INSIDE and not isinstance(seen.meaning[node], Numbered)

    while inside := [node for node in _crossing(graph, seen, halved) if not joins(node)]:
        gone = [*inside]
        while gone:
            node = gone.pop()
            halved.discard(node)
            gone += node.users


def _same_for_both(graph: fx.Graph, seen: _Seen) -> set[fx.Node]:
    """What is made once: the same for all elements, written by nobody, and of nothing that is, or is made twice."""
    found = set[fx.Node]()
    for node in graph.nodes:
        read = _read(node, seen)
        made = [each for each in read if each.op != "placeholder"]
        if seen.meaning.get(node) is SHARED and not seen.written & {node, *read} and found.issuperset(made):
            found.add(node)
    return found


class _Halves:
    """Writes the new graph."""

    def __init__(self, old: fx.Graph, seen: _Seen, halved: set[fx.Node], batch: sympy.Symbol) -> None:
        self.old, self.seen, self.halved, self.batch = old, seen, halved, batch
        self.new = fx.Graph()
        self.given = dict[fx.Node, fx.Node]()
        self.of_half: list[dict[fx.Node, fx.Node]] = [{} for _ in range(HALVES)]
        self.whole = dict[fx.Node, fx.Node]()
        self.once = _same_for_both(old, seen)

    def graph(self) -> fx.Graph:
        """Inputs, both halves, and the rest."""
        for node in self.old.find_nodes(op="placeholder"):
            self.given[node] = self.whole[node] = self.new.node_copy(node)
        for number, half in enumerate(self.of_half):  # before any context
            half.update({node: self._part(node, number) for node in self.given})
        rest = [node for node in self.old.nodes if node.op != "placeholder"]
        for number in range(HALVES):
            for node in rest:
                if node in self.halved or node.target in CONTEXTS:
                    self._once(node, number)
        self.whole |= {node: self._joined(node) for node in _crossing(self.old, self.seen, self.halved)}
        for node in rest:
            if node not in self.halved and node not in self.seen.numbers:
                self.whole[node] = self._copied(node, self._of_whole)
        return self.new

    def _once(self, node: fx.Node, number: int) -> None:
        """For this half; what is the same for both is made once."""
        shared = node in self.once
        if number and shared:
            self.of_half[number][node] = self.of_half[0][node]
            return
        made = self._copied(node, lambda each: self._of_half(each, number), shared)
        _halve(made, number)
        self.of_half[number][node] = made

    def _copied(self, node: fx.Node, find: Any, same: bool = False) -> fx.Node:
        made = self.new.node_copy(node, find)
        if not same:  # but of another size
            made.meta.pop("example_value", None)
        return made

    def _of_half(self, node: fx.Node, number: int) -> fx.Node:
        """What stands for it in this half; numbers are reckoned when they are read."""
        half = self.of_half[number]
        if node not in half:
            half[node] = self._copied(node, lambda each: self._of_half(each, number))
        return half[node]

    def _part(self, node: fx.Node, number: int) -> fx.Node:
        """This half of an input."""
        value, meaning, given = node.meta["example_value"], self.seen.given.get(node), self.given[node]
        if isinstance(value, torch.SymInt) and expression(value) == self.batch:
            return self.new.call_function(operator.floordiv, (given, HALVES))
        if not isinstance(meaning, Rows):
            return given
        whole = self.new.call_method("size", (given, meaning.dim))
        half = self.new.call_function(operator.floordiv, (whole, HALVES))
        begin = self.new.call_function(operator.mul, (half, number))
        return self.new.call_method("narrow", (given, meaning.dim, begin, half))

    def _of_whole(self, node: fx.Node) -> fx.Node:
        """What stands for it in what is not halved; numbers are reckoned when they are read."""
        if node not in self.whole:
            self.whole[node] = self._copied(node, self._of_whole)
        return self.whole[node]

    def _joined(self, node: fx.Node) -> fx.Node:
        halves, meaning = [each[node] for each in self.of_half], self.seen.meaning[node]
        if not isinstance(meaning, Rows):
            return halves[0]
        return self.new.call_function(torch.cat, (halves, meaning.dim))


def slot_of_half(slot: int, number: int) -> int:
    """Of what has a slot in the whole: halves have different ones, as both may be under way at once."""
    return WAYS * number + slot % WAYS


def _halve(node: fx.Node, number: int) -> None:
    """An exchange of half the tokens, in a slot of this half's own."""
    if getattr(node.target, "namespace", None) != "moecompile":
        return
    given: Any = node.kwargs
    if "slot" in given:
        node.update_kwarg("slot", slot_of_half(given["slot"], number))
    if "capacity" in given:
        node.update_kwarg("capacity", -(-given["capacity"] // HALVES))
    if isinstance(room := given.get("room"), int):
        node.update_kwarg("room", max(min(room, ROWS_AT_LEAST), -(-room // HALVES)))
