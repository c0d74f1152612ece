"""Cutting one block out of a captured graph, twice: as the model wrote it, and as it is rewritten."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from moecompile.bodies import copy_graph
from moecompile.passes.fuse import fuse
from moecompile.passes.site import Operand, Site


@dataclass(frozen=True)
class Cut:
    """One block as two functions of the same inputs.

    Attributes:
        inputs: the nodes of the graph, outside the block, whose values the functions take.
        original: the nodes of the block, as they are in the graph; returns the block's result.
        replacement: what the pass `fuse` makes of `original`.
    """

    inputs: tuple[fx.Node, ...]
    original: fx.GraphModule
    replacement: fx.GraphModule


def cut(site: Site) -> Cut:
    """Cuts a block out of the graph that its nodes lie in, which stays as it is."""
    block = [node for node in site.node.graph.nodes if node in site.region]
    read = [argument for node in block for argument in node.all_input_nodes]
    inputs = tuple(node for node in dict.fromkeys([*read, *_operand_nodes(site)]) if node not in site.region)

    graph = fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(inputs):
        places[node] = graph.placeholder(f"input_{number}")
        places[node].meta = dict(node.meta)
    for node in block:
        places[node] = graph.node_copy(node, places.__getitem__)
    graph.output(places[site.node])

    rewritten, again = copy_graph(graph)
    fuse(rewritten, [moved(moved(site, places), again)])
    return Cut(inputs, fx.GraphModule({}, graph), fx.GraphModule({}, rewritten))


def moved(site: Site, places: Mapping[fx.Node, fx.Node]) -> Site:
    """The same block in a copy of its graph, `places` saying where each node went."""
    operands = {
        name: Operand(places[operand.node], operand.steps, tuple(places[part] for part in operand.parts))
        for name, operand in site.operands.items()
    }
    base = None if site.base is None else places[site.base]
    region = frozenset(places[node] for node in site.region)
    return dataclasses.replace(site, node=places[site.node], base=base, operands=operands, region=region)


def _operand_nodes(site: Site) -> list[fx.Node]:
    operands = [node for operand in site.operands.values() for node in (operand.node, *operand.parts)]
    return operands if site.base is None else [*operands, site.base]
