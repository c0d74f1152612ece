"""What the options that give compiled graphs more inputs have in common: a graph of their own, and what users are told.

Dynamo goes on reading its graph after the backend has had it, so that one stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import fx

from moecompile.bodies import bodies_of, copy_graph, copy_tree
from moecompile.report import GraphReport

log = logging.getLogger("moecompile")


def own_graph(gm: fx.GraphModule) -> fx.Graph:
    """A copy of the graph that may be rewritten."""
    graph, _ = copy_graph(gm.graph)
    _forget_inputs(graph)
    return graph


def own_tree(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph and of the bodies below it that may be rewritten, with what Dynamo notes beside it."""
    made = copy_tree(gm)
    _forget_inputs(made.graph)
    _note_what_dynamo_notes(gm, made)
    return made


def with_graph(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """The same module around another graph, with what Dynamo notes beside it."""
    made = fx.GraphModule(gm, graph)
    made.meta.update(gm.meta)
    _note_what_dynamo_notes(gm, made)
    return made


def _forget_inputs(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)  # Dynamo's own, which refers to the input, and which it clears in its graph


def _note_what_dynamo_notes(gm: fx.GraphModule, made: fx.GraphModule) -> None:
    for name, value in vars(gm).items():
        if name not in vars(made):
            setattr(made, name, value)


def nested_nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of the bodies below the main graph, which gets nothing for them."""
    return (node for path, body in bodies_of(gm).items() if path for node in body.graph.nodes)


def say(record: GraphReport, option: str, note: str) -> None:
    """Warns of what an option does not do, and notes it."""
    log.warning("%s: %s", option, note)
    record.notes.append(f"{option}: {note}")
