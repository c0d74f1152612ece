"""Cutting one block out of a captured graph, twice: as the model wrote it, and as it is rewritten.

Where the routing weights come as a table of all experts, the code that makes the table is cut out along. The model's
own code passes a gradient to every entry of the table, ours only to those of chosen experts; that is the same for the
model, because the table's other entries are constant zeros, and that has to show in the comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moecompile.bodies import copy_graph
from moecompile.passes.expert_parallel import gather_of
from moecompile.passes.fuse import fuse
from moecompile.passes.layout import Layout
from moecompile.passes.provenance import tensor_of
from moecompile.passes.site import Operand, Site
from moecompile.passes.spelling import operation_name

OWN = torch.ops.moecompile.own_experts.default
_MATRIX_PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"})


@dataclass(frozen=True)
class Cut:
    """One block as two functions of the same inputs.

    Attributes:
        inputs: the nodes of the graph, outside of what is cut out, whose values the functions take.
        original: the nodes cut out, as they are in the graph; returns the block's result.
        replacement: what the passes `fuse` and `exchange` make of `original`.
        whole_on: of each input, the group of ranks that all have it whole, and in `replacement` use their own experts'
            part of it for all ranks' tokens: only the sum of the ranks' gradients is the same. None of other inputs.
    """

    inputs: tuple[fx.Node, ...]
    original: fx.GraphModule
    replacement: fx.GraphModule
    whole_on: tuple[str | None, ...]


def cut(site: Site, exchange: Callable[[fx.Graph], None] | None = None) -> Cut:
    """Cuts a block out of the graph that its nodes lie in, which stays as it is.

    Args:
        site: the block.
        exchange: exchanges its tokens, in the graph of the replacement, where experts are spread over ranks. What
            gathers them is cut out along, so that the inputs are each rank's own.
    """
    inside = site.region | _table_code(site)
    if exchange is not None:
        inside |= _gathering([*_operand_nodes(site), *(read for node in inside for read in node.all_input_nodes)])
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
    if exchange is not None:
        exchange(rewritten)
    return Cut(inputs, fx.GraphModule({}, graph), fx.GraphModule({}, rewritten), tuple(_groups_with_all(rewritten)))


def moved(site: Site, places: Mapping[fx.Node, fx.Node]) -> Site:
    """The same block in a copy of its graph, `places` saying where each node went."""
    private = {entry.name: getattr(site, entry.name) for entry in dataclasses.fields(site) if not entry.repr}
    return dataclasses.replace(site, **{name: _mapped(value, places) for name, value in private.items()})


def _mapped(value: Any, places: Mapping[fx.Node, fx.Node]) -> Any:
    """A value of a block's private field, whatever it is made of, with every node replaced."""
    if isinstance(value, fx.Node):
        return places[value]
    if isinstance(value, Operand):
        parts = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return dataclasses.replace(value, **_mapped(parts, places))
    if isinstance(value, dict):
        return {key: _mapped(part, places) for key, part in value.items()}
    if isinstance(value, tuple | frozenset):
        return type(value)(_mapped(part, places) for part in value)
    return value


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
            or operation_name(node) in _MATRIX_PRODUCTS
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


def _groups_with_all(graph: fx.Graph) -> Iterator[str | None]:
    """Of each input, the group whose ranks take their own experts' part of it, if they do."""
    found: dict[fx.Node, str] = {}
    for node in graph.find_nodes(op="call_function", target=OWN):
        waiting = [*node.all_input_nodes]
        while waiting:
            made = waiting.pop()
            found[made] = str(node.kwargs["group"])
            waiting += made.all_input_nodes
    return (found.get(node) for node in graph.find_nodes(op="placeholder"))


def _gathering(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """What gathers those of these tensors that are experts, and what is done to them before."""
    found: set[fx.Node] = set()
    for node in nodes:
        gather = gather_of(node)
        step = node
        while gather is not None and step not in found:
            found.add(step)
            if step is not gather:
                (step,) = step.all_input_nodes
    return found


def _operand_nodes(site: Site) -> list[fx.Node]:
    return list(_nodes((*site.operands.values(), site.base)))


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, Operand):
        yield from _nodes(tuple(getattr(value, entry.name) for entry in dataclasses.fields(value)))
    elif isinstance(value, tuple):
        for part in value:
            yield from _nodes(part)
