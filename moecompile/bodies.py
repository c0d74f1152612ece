"""A captured graph is a tree; this room walks, prints and copies it.

The bodies of higher-order operators (activation checkpointing, nested compile regions) are graph modules of their own
below the main one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import fx

from moecompile.passes.flatten import body_of
from moecompile.passes.printer import graph_text


def bodies_of(gm: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """Path to graph module, for the main one (its path is empty) and every body below it that is used, each once.

    Bodies that Dynamo inlined into the main graph still hang below it, but no node takes them.
    """
    found = {"": gm}
    waiting = [("", gm)]
    while waiting:
        prefix, module = waiting.pop()
        for node in module.graph.find_nodes(op="get_attr"):
            body = body_of(module, node)
            if body is not None and body not in found.values():
                path = f"{prefix}{node.target}"
                found[path] = body
                waiting.append((f"{path}.", body))
    return found


def text_of(gm: fx.GraphModule, *, collapse: bool = False, inputs: Sequence[str] = ()) -> str:
    """A graph and all bodies below it in our stable text, the bodies under a heading with their path.

    Args:
        gm: a graph of Dynamo's or AOTAutograd's.
        collapse: as in `passes.printer.graph_text`.
        inputs: names of the inputs of the main graph, where it does not know them itself.
    """
    sections = []
    for path, module in bodies_of(gm).items():
        text = graph_text(module.graph, collapse=collapse, counts=collapse, inputs=() if path else inputs)
        sections.append(f"{path}:\n{text}" if path else text)
    return "\n\n".join(sections)


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, fit to stand in for it in its graph module, and where each node went."""
    duplicate = copy.deepcopy(graph)
    places = dict(zip(graph.nodes, duplicate.nodes, strict=True))
    for node, place in places.items():
        # AOTAutograd reads where an input comes from here; it is no part of what fx copies
        if hasattr(node, "_dynamo_source"):
            place._dynamo_source = node._dynamo_source
    return duplicate, places


def copy_tree(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a captured graph and of the bodies below it, to be run; tensors they hold are shared."""
    copies: dict[fx.GraphModule, fx.GraphModule] = {}
    for module in reversed(bodies_of(gm).values()):
        copies[module] = duplicate = fx.GraphModule(module, copy_graph(module.graph)[0], module.__class__.__name__)
        duplicate.meta.update(module.meta)
        for name, child in module.named_children():
            if child in copies:
                setattr(duplicate, name, copies[child])
    return copies[gm]
