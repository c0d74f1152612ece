"""Take the casts of parameters out of a graph: what they give comes in, made once until the parameters change.

Contract
- On entry matrices are cast by `moecompile::quantize_weights` (passes/precision.py).
- A cast is taken out if its matrices are parameters that the graph gets as inputs. Others stay, with the reason.
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
    lifted, kept, last = list[Lifted](), list[Kept](), [*places][-1:]
    for node in graph.find_nodes(op="call_function", target=torch.ops.moecompile.quantize_weights.default):
        matrices = [argument for argument in (*node.args, node.kwargs.get("w_up")) if argument is not None]
        if not all(isinstance(each, fx.Node) and _is_parameter(each, places) for each in matrices):
            kept.append(
                Kept(module_of(node), f"{' and '.join(map(str, matrices))}: no parameter that the graph is given")
            )
            continue
        parts = {part.args[1]: part for part in node.users if part.target is operator.getitem}
        for number, result in enumerate(RESULTS):
            with graph.inserting_after(last[0]):
                last[0] = graph.placeholder(f"{matrices[0].name.rstrip('_')}_fp8_{result}")
            last[0]._dynamo_source = None  # AOTAutograd asks where inputs come from: not from the user's code
            last[0].meta.update(parts[number].meta)
            parts[number].replace_all_uses_with(last[0])
            graph.erase_node(parts[number])
        attributes = str(node.kwargs.get("gate_up", "single")), bool(node.kwargs.get("transposed", False))
        lifted.append(Lifted(tuple(places[each] for each in matrices), *attributes))
        graph.erase_node(node)
    return lifted, kept


def _is_parameter(node: fx.Node, places: dict[fx.Node, int]) -> bool:
    return node in places and isinstance(fake_of(node), nn.Parameter)
