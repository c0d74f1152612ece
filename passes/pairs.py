"""One graph of a backward and of a forward that have nothing in common: what overlaps is ordered afterwards.

Contract
- On entry both graphs are AOTAutograd's, of different micro-batches, with example values; they stay as they are.
- The new graph has the backward's inputs, then the forward's; their outputs in the same order; and the nodes of the
  backward, then those of the forward. Nodes keep their names behind `b_` and `f_`.
- Exchanges of the two are in different slots of the kernels' memory, so that both may be under way at once.
- Refused is what has no such graph: `obstacle`.

DeepSeek-V3's report, section 3.2.1, has the pair; the order comes from moecompile/passes/overlap.py.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from moecompile.passes.costs import STARTS, has_symbols
from moecompile.passes.effects import EXCHANGES, PART, PARTS, WHOLE
from moecompile.passes.joint_graph import argument, give, packet_of
from moecompile.passes.microbatches import WAYS, slot_of_half


def obstacle(graphs: Sequence[fx.GraphModule]) -> str:
    """Why these graphs are not made one, if they are not."""
    for gm in graphs:
        if known_when_run(gm.graph) or any(has_symbols(node.meta.get("val")) for node in gm.graph.nodes):
            return "there are sizes that are known only when the graph runs"
        if not _one_after_the_other(gm.graph):
            return "its own exchanges are under way at once, in slots that another graph needs"
    return ""


def known_when_run(graph: fx.Graph) -> bool:
    """Whether there are sizes that nobody knows before: of what is not zero, say."""
    return any(
        node.meta.get("unbacked_bindings") or any(map(free_unbacked_symbols, tree_leaves(node.meta.get("val"))))
        for node in graph.nodes
    )


def paired(backward: fx.GraphModule, forward: fx.GraphModule) -> fx.GraphModule:
    """Both as one. Those nodes have no example values that are right together: they are of different traces."""
    new, root = fx.Graph(), torch.nn.Module()
    places: tuple[dict[fx.Node, fx.Node], ...] = ({}, {})
    for part, gm, found in zip(PARTS, (backward, forward), places, strict=True):
        for node in gm.graph.find_nodes(op="placeholder"):
            found[node] = new.placeholder(name_in(part, node.name))
            found[node].meta = copy.copy(node.meta)
    outputs: list[Any] = []
    for number, (gm, found) in enumerate(zip((backward, forward), places, strict=True)):
        for node in gm.graph.nodes:
            if node.op == "output":
                outputs += fx.node.map_arg(node.args[0], found.__getitem__)
            elif node.op != "placeholder":
                found[node] = _copied(node, gm, new, root, number, found)
    new.output(tuple(outputs))
    return fx.GraphModule(root, new)


def name_in(part: str, name: str) -> str:
    """Of a pair, that of what has this name in its part."""
    return f"{part[0]}_{name}"


def _copied(
    node: fx.Node, gm: fx.GraphModule, new: fx.Graph, root: torch.nn.Module, number: int, found: dict[fx.Node, fx.Node]
) -> fx.Node:
    if node.op == "get_attr":
        name = name_in(PARTS[number], str(node.target).replace(".", "_"))
        setattr(root, name, operator.attrgetter(str(node.target))(gm))
        made = new.get_attr(name)
    else:
        made = new.create_node(
            node.op,
            node.target,
            fx.node.map_arg(node.args, found.__getitem__),
            fx.node.map_arg(node.kwargs, found.__getitem__),
            name_in(PARTS[number], node.name),
        )
    made.meta = copy.copy(node.meta) | {PART: PARTS[number]}
    if packet_of(made) in (*EXCHANGES, *WHOLE):
        give(made, "slot", slot_of_half(argument(made, "slot"), number))
    return made


def _one_after_the_other(graph: fx.Graph) -> bool:
    """Whether of all exchanges in one of WAYS slots each has ended before another begins."""
    under_way = set[int]()
    for node in graph.nodes:
        packet = packet_of(node) if node.op == "call_function" else None
        if packet in STARTS:
            slot = argument(node, "slot") % WAYS
            if slot in under_way:
                return False
            under_way.add(slot)
        elif packet in EXCHANGES:
            under_way.discard(argument(node, "slot") % WAYS)
        elif packet in WHOLE and under_way:
            return False
    return True
