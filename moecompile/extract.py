"""Cutting one block out of a captured graph, twice: as the model wrote it, and as it is rewritten.

Where the routing weights come as a table of all experts, the code that makes the table is cut out along. The model's
own code passes a gradient to every entry of the table, ours only to those of chosen experts; that is the same for the
model, because the table's other entries are constant zeros, and that has to show in the comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from moecompile.bodies import copy_graph
from moecompile.passes.fuse import fuse
from moecompile.passes.provenance import tensor_of
from moecompile.passes.region import Layout
from moecompile.passes.site import Operand, Site
from moecompile.passes.spelling import operation_name

_PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"})


@dataclass(frozen=True)
class Cut:
    """One block as two functions of the same inputs.

    Attributes:
        inputs: the nodes of the graph, outside of what is cut out, whose values the functions take.
        original: the nodes cut out, as they are in the graph; returns the block's result.
        replacement: what the pass `fuse` makes of `original`.
    """

    inputs: tuple[fx.Node, ...]
    original: fx.GraphModule
    replacement: fx.GraphModule


def cut(site: Site) -> Cut:
    """Cuts a block out of the graph that its nodes lie in, which stays as it is."""
    inside = site.region | _table_code(site)
    block = [node for node in site.node.graph.nodes if node in inside]
    read = [argument for node in block for argument in node.all_input_nodes]
    inputs = tuple(node for node in dict.fromkeys([*read, *_operand_nodes(site)]) if node not in inside)

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


def _table_code(site: Site) -> set[fx.Node]:
    """What makes a table of routing weights, from the router's matrix product on, writes into it included."""
    weights = site.operands.get("weights")
    if weights is None or all(step != "gather" for step, _ in weights.steps):
        return set()
    layout = Layout(site.node.graph)
    stops = set(_operand_nodes(site)) - {weights.node}
    found: set[fx.Node] = set()
    waiting = [weights.node]
    while waiting:
        node = waiting.pop()
        if (
            node in found
            or node in stops
            or node.op in ("placeholder", "get_attr")
            or operation_name(node) in _PRODUCTS
        ):
            continue
        found.add(node)
        aliases = set(layout.aliases.of(node))
        early = (writer for writer in layout.writers if layout.position[writer] < layout.position[weights.node])
        waiting += [writer for writer in early if aliases & set(layout.writers[writer])]
        waiting += [
            argument for argument in node.all_input_nodes if isinstance(tensor_of(argument), Tensor | tuple | list)
        ]
    return found


def _operand_nodes(site: Site) -> list[fx.Node]:
    operands = [node for operand in site.operands.values() for node in (operand.node, *operand.parts)]
    return operands if site.base is None else [*operands, site.base]
