"""Take the casts of parameters out of a graph: what they give comes in, made once until the parameters change.

Contract
- On entry matrices are cast by `moecompile::quantize_weights` (passes/precision.py).
- A cast is taken out if its matrices are parameters that the graph gets as inputs and does not write. Others stay, with
  the reason.
- Inputs that there were keep their places; the new ones follow, four for each cast that is taken out, in their order.

    in_ = moecompile.quantize_weights(w_in, gate_up="halves")
        becomes the inputs w_in_fp8_values, w_in_fp8_scales, w_in_fp8_values_t, w_in_fp8_scales_t
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from moecompile.passes.aliases import fake_of
from moecompile.passes.layout import Layout
from moecompile.passes.precision import Kept
from moecompile.passes.provenance import module_of

RESULTS = ("values", "scales", "values_t", "scales_t")


@dataclass(frozen=True)
class Lifted:
    """A cast that is no longer in the graph.

    Attributes:
        matrices: which of the graph's inputs it casts: one, or gate and up projection.
        gate_up: how these lie, as of `moecompile::quantize_weights`.
        transposed: likewise.
    """

    matrices: tuple[int, ...]
    gate_up: str
    transposed: bool


def lift_casts(graph: fx.Graph) -> tuple[list[Lifted], list[Kept]]:
    """Rewrite the graph in place; returns what was lifted and what was not. The caller recompiles the GraphModule."""
    places = {node: number for number, node in enumerate(graph.find_nodes(op="placeholder"))}
    layout, lifted, kept, last = Layout(graph), list[Lifted](), list[Kept](), next(reversed(places), None)
    for node in graph.find_nodes(op="call_function", target=torch.ops.moecompile.quantize_weights.default):
        matrices = [argument for argument in (*node.args, node.kwargs.get("w_up")) if argument is not None]
        reason = _obstacle(matrices, places, layout)
        if reason or last is None:
            kept.append(Kept(module_of(node), reason))
            continue
        attributes = str(node.kwargs.get("gate_up", "single")), bool(node.kwargs.get("transposed", False))
        lifted.append(Lifted(tuple(places[each] for each in matrices), *attributes))
        last = _lift(graph, node, matrices[0].name, last)
    return lifted, kept


def _obstacle(matrices: list[fx.Node], places: dict[fx.Node, int], layout: Layout) -> str:
    """Why a cast of these has to stay, if it has to."""
    if not all(each in places and isinstance(fake_of(each), nn.Parameter) for each in matrices):
        return f"{' and '.join(map(str, matrices))}: no parameter that the graph is given"
    for target in (target for targets in layout.writers.values() for target in targets):
        if any(layout.aliases.share(target, each) for each in matrices):
            return f"{target} is written in the graph itself"
    return ""


def _lift(graph: fx.Graph, cast: fx.Node, name: str, last: fx.Node) -> fx.Node:
    """Puts inputs behind the `last` one in place of a cast's results; returns the one that is the last then."""
    parts = {part.args[1]: part for part in cast.users if part.target is operator.getitem}
    for number, result in enumerate(RESULTS):
        with graph.inserting_after(last):
            last = graph.placeholder(f"{name.rstrip('_')}_fp8_{result}")
        last._dynamo_source = None  # AOTAutograd asks where inputs come from: not from the user's code
        last.meta.update(parts[number].meta)
        parts[number].replace_all_uses_with(last)
        graph.erase_node(parts[number])
    graph.erase_node(cast)
    return last
