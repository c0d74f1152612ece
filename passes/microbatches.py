"""Split a graph's batch into two micro-batches, whose communication then hides behind each other's computation.

Contract
- On entry the graph is one of Dynamo's, after all other passes; its batch is a symbol, the first dimension of inputs.
- It is proven that each element is computed by itself (`moecompile.passes.batch_rows`), on the operators that the graph
  is traced to; and the batch of this call is even. Else nothing changes, and the reason is given.
- What comes back is a graph that runs this one on both halves and joins the results; the halves' exchanges are of half
  the tokens, in slots of their own. AOTAutograd traces it like any other: forward and backward both hold two
  independent bodies.

    half(x) = x[: B / 2], x[B / 2 :]  for inputs that have the batch, B / 2 for the batch itself, and x for all others
    results = cat(graph(first halves), graph(second halves))
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from moecompile.passes.batch_rows import NotProvenError, prove
from moecompile.passes.costs import expression
from moecompile.runtime.peer_memory import ROWS_AT_LEAST

aten = torch.ops.aten
HALVES = 2
WAYS = 2
"""There and back: slots of one block's exchange. Of a half all blocks have the same two, as they follow each other."""


def split(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of the same inputs and outputs that computes halves.

    Args:
        gm: as the contract has it, with example values of its inputs; it becomes a part of the new one.

    Raises:
        NotProvenError: why it stays whole.
    """
    inputs = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    (output,) = gm.graph.find_nodes(op="output")
    if not all(isinstance(each, fx.Node) for each in output.args[0]):
        raise NotProvenError("some of its results are constants")
    batch = _batch_of(inputs)
    traced = _traced(gm, inputs)
    _drop_what_nobody_reads(traced)
    prove(traced, batch)
    return _of_halves(gm, inputs, batch)


def _traced(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.Graph:
    """Its operators, as they are without autograd, and without what is written in place."""
    functional = dispatch_functionalize(gm)
    try:
        with torch.no_grad():
            return make_fx(functional, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs).graph
    except Exception as error:  # of whatever is in the graph
        raise NotProvenError(f"it cannot be traced with fake tensors: {type(error).__name__}: {error}") from error


def _drop_what_nobody_reads(graph: fx.Graph) -> None:
    """What blocks of experts were rewritten from, which is left for the check that numbers of rows are not negative."""
    for check in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        condition: Any = check.args[0]
        if isinstance(condition, fx.Node) and condition.target is operator.ge and condition.args[1] == 0:
            graph.erase_node(check)
    graph.eliminate_dead_code()


def _batch_of(inputs: Sequence[Any]) -> sympy.Symbol:
    """The one symbol that is the first dimension of inputs, and even."""
    firsts = [each.shape[0] for each in inputs if isinstance(each, Tensor) and each.dim()]
    found: dict[Any, Any] = {expression(size): size for size in firsts if isinstance(size, torch.SymInt)}
    if not found:
        raise NotProvenError("its batch is a number: call moecompile.mark_batch(inputs) before the first call")
    if len(found) > 1 or not isinstance(next(iter(found)), sympy.Symbol):
        raise NotProvenError(f"its inputs have several first dimensions: {', '.join(map(str, found))}")
    ((batch, size),) = found.items()
    hint = size.node.hint
    if hint is None or hint % HALVES:
        raise NotProvenError(f"a batch of {hint} has no halves")
    torch._check(size % HALVES == 0)  # else it is compiled once more, and stays whole
    return batch


def _of_halves(gm: fx.GraphModule, inputs: Sequence[Any], batch: sympy.Symbol) -> fx.GraphModule:
    parts = [_for_half(gm, number) for number in range(HALVES)]
    root, graph = torch.nn.Module(), fx.Graph()
    given = [graph.placeholder(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    for node, value in zip(given, inputs, strict=True):
        node.meta["example_value"] = value
    results = []
    for number, part in enumerate(parts):
        setattr(root, f"half_{number}", part)
        args = tuple(_half(graph, *each, batch, number) for each in zip(given, inputs, strict=True))
        results.append(graph.call_module(f"half_{number}", args))
    (output,) = gm.graph.find_nodes(op="output")
    count = len(output.args[0])
    joined = []
    for place in range(count):
        halves = [graph.call_function(operator.getitem, (result, place)) for result in results]
        joined.append(graph.call_function(torch.cat, (halves,)))
    graph.output(tuple(joined))
    return fx.GraphModule(root, graph)


def _half(graph: fx.Graph, node: fx.Node, value: Any, batch: sympy.Symbol, number: int) -> fx.Node:
    if isinstance(value, torch.SymInt) and expression(value) == batch:
        return graph.call_function(operator.floordiv, (node, HALVES))
    if not isinstance(value, Tensor) or not value.dim() or expression(value.shape[0]) != batch:
        return node
    halves = graph.call_method("chunk", (node, HALVES))
    return graph.call_function(operator.getitem, (halves, number))


def _for_half(gm: fx.GraphModule, number: int) -> fx.GraphModule:
    """The same graph with the same parameters: exchanges of half the tokens, in slots of this half's own."""
    made = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    for node in made.graph.nodes:
        _halve(node, number)
    made.recompile()
    return made


def _halve(node: fx.Node, number: int) -> None:
    if getattr(node.target, "namespace", None) != "moecompile":
        return
    given: Any = node.kwargs
    if "slot" in given:
        node.update_kwarg("slot", WAYS * number + given["slot"] % WAYS)
    if "capacity" in given:
        node.update_kwarg("capacity", -(-given["capacity"] // HALVES))
    if isinstance(room := given.get("room"), int):
        node.update_kwarg("room", max(min(room, ROWS_AT_LEAST), -(-room // HALVES)))
