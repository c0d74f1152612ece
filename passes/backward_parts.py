"""Divide a backward: gradients of what came into a stage first, gradients of its parameters later.

Contract
- On entry the graph is AOTAutograd's backward, with example values; it stays as it is. Its outputs are gradients of the
  forward's inputs, or None, one for each.
- The first part is given what the backward is given. It computes the gradients that are not put off; it communicates,
  draws random numbers and writes as the whole would, in the same order.
- The second part is given some of the same inputs, and what the first hands over. It only computes.
- Views are made again in the second part, and not handed over; of experts' gradients each part computes its own
  (moecompile/passes/expert_gradients.py).

    first   = what the gradients of inputs need, and what communicates or has effects, with what that needs
    second  = the rest
    handed  = results of the first part that the second reads

The weight part of a backward fills the bubbles of a pipeline (Zero Bubble Pipeline Parallelism, arXiv 2401.10241).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import SymInt, fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._pytree import tree_leaves

from moecompile.passes.costs import VIEWS, expression, sizes_of
from moecompile.passes.effects import WAITS, group_of, kept_in_order, kinds_of
from moecompile.passes.expert_gradients import divide_expert_backwards
from moecompile.passes.joint_graph import packet_of
from moecompile.passes.purposes import ancestors


@dataclass(frozen=True)
class Parts:
    """Of a divided backward.

    Attributes:
        first: of the backward's inputs; gives those gradients that are not put off, then what it hands over.
        second: of some of these inputs and of what the first hands over; gives the gradients that are put off.
        at_once: of the backward's outputs, which the first part gives.
        later: which the second gives.
        kept: of the backward's inputs, which the second part is given.
    """

    first: fx.GraphModule
    second: fx.GraphModule
    at_once: tuple[int, ...]
    later: tuple[int, ...]
    kept: tuple[int, ...]


def divide(backward: fx.GraphModule, later: Collection[int]) -> Parts | None:
    """Both parts; None if nothing is computed for the gradients that are to be put off alone, or not of known sizes.

    Args:
        backward: of AOTAutograd's.
        later: which outputs are put off. Those that need effects are not.
    """
    backward = fx.GraphModule(backward, _copied(backward.graph))
    graph = backward.graph
    (output,) = graph.find_nodes(op="output")
    outputs, given = list(output.args[0]), graph.find_nodes(op="placeholder")
    wanted = [each for place, each in enumerate(outputs) if place not in later and isinstance(each, fx.Node)]
    at_first = [*wanted, *filter(_acts, graph.nodes)]
    early = _with_what_comes_first(graph, at_first)
    if divide_expert_backwards(graph, early):
        early = _with_what_comes_first(graph, at_first)
    for node in graph.nodes:  # what is there is taken apart where it is
        if node.target is operator.getitem and node.args[0] in early:
            early.add(node)
    put_off = [place for place in later if isinstance(outputs[place], fx.Node) and outputs[place] not in early]
    if not put_off:
        return None
    at_once = [place for place in range(len(outputs)) if place not in put_off]
    needed = ancestors(outputs[place] for place in put_off)
    again = _views_of_inputs(graph, given)
    second = [node for node in graph.nodes if node in needed and (node not in early or node in again)]
    read = {each for node in second for each in node.all_input_nodes} | {outputs[place] for place in put_off}
    kept = [place for place, node in enumerate(given) if node in read]
    handed = [node for node in graph.nodes if node in read & early - again and node.op != "placeholder"]
    both = (
        _extracted(backward, given, early, [*(outputs[place] for place in at_once), *handed]),
        _extracted(backward, [*(given[place] for place in kept), *handed], second, [outputs[n] for n in put_off]),
    )
    if not all(_is_told_its_sizes(part.graph) for part in both):
        return None
    return Parts(*both, *map(tuple, (at_once, put_off, kept)))


def _with_what_comes_first(graph: fx.Graph, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """These, with what they read, and what has to have run before: what reads an input before it is written, say."""
    found, kept = ancestors(nodes), kept_in_order(graph)
    while more := {before for node in found for before in kept.get(node, ())} - found:
        found |= ancestors(more)
    return found


def _copied(graph: fx.Graph) -> fx.Graph:
    new, places = fx.Graph(), dict[fx.Node, fx.Node]()
    new.output(new.graph_copy(graph, places))
    return new


def _is_told_its_sizes(graph: fx.Graph) -> bool:
    """Whether each symbol of its sizes is a size that the graph is given, or comes up in it: Inductor finds it so."""
    known, met = set[sympy.Symbol](), set[sympy.Symbol]()
    for node in graph.nodes:
        symbols = {symbol for each in tree_leaves(node.meta.get("val")) for symbol in free_symbols(each)}
        met |= symbols
        if node.op == "placeholder":
            known |= symbols & {expression(size) for size in sizes_of(node.meta.get("val")) if isinstance(size, SymInt)}
        elif node.meta.get("unbacked_bindings"):
            known |= symbols
    return met <= known


def _acts(node: fx.Node) -> bool:
    """Whether it does more than compute."""
    if node.op != "call_function":
        return False
    return group_of(node) is not None or packet_of(node) in WAITS or bool(kinds_of(node))


def _views_of_inputs(graph: fx.Graph, given: Sequence[fx.Node]) -> set[fx.Node]:
    """What moves nothing, of inputs and constants alone, and these."""
    known = {*given, *graph.find_nodes(op="get_attr")}
    for node in graph.nodes:
        if node.op == "call_function" and packet_of(node) in VIEWS and known.issuperset(node.all_input_nodes):
            known.add(node)
    return known - {*given}


def _extracted(
    root: fx.GraphModule, inputs: Sequence[fx.Node], nodes: Collection[fx.Node], outputs: Sequence[Any]
) -> fx.GraphModule:
    """A graph of these inputs, in the order of the whole, which gives these outputs."""
    new, places, inside = fx.Graph(), dict[fx.Node, fx.Node](), {*nodes}
    for node in inputs:
        places[node] = new.placeholder(node.name)
        places[node].meta = copy.copy(node.meta)
    for node in root.graph.nodes:
        if node in inside and node not in places and node.op != "placeholder":
            places[node] = new.node_copy(node, places.__getitem__)
            places[node].meta = copy.copy(node.meta)
    new.output(tuple(places[each] if isinstance(each, fx.Node) else each for each in outputs))
    return fx.GraphModule(root, new)
