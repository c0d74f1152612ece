"""Give the experts main gradients: float32 tensors, from outside the graph, that gradients of matrices are added to.

Contract
- On entry the experts are `moecompile::experts` or `moecompile::experts_fp8` (passes/fuse.py, passes/precision.py).
- A matrix gets one if it is a parameter that the graph gets as an input, and that has one. Others keep their gradients,
  and are returned with the reason.
- Inputs that there were keep their places; the new ones follow, one for each such parameter, in their order.

    moecompile.experts(x, ..., w_in, w_out, ...)
        becomes moecompile.experts(x, ..., w_in, w_out, ..., main_w_in=w_in_main_grad, main_w_out=w_out_main_grad)
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from moecompile.passes.aliases import empty_fake, fake_of
from moecompile.passes.precision import Kept
from moecompile.passes.provenance import module_of
from moecompile.runtime.main_gradients import KEYWORDS

OPERATORS = (torch.ops.moecompile.experts.default, torch.ops.moecompile.experts_fp8.default)
PLACES = {"w_in": 5, "w_out": 6, "w_up": 7}
"""Of the matrices among the operators' arguments."""


def add_main_gradients(graph: fx.Graph, having: Collection[int]) -> tuple[list[int], list[Kept]]:
    """Rewrite the graph in place; the caller recompiles the GraphModule.

    Args:
        graph: of Dynamo's.
        having: which of the graph's inputs have a main gradient.

    Returns:
        of which inputs the new ones are the main gradients; the modules whose matrices have none, and why.
    """
    inputs, kept = list(graph.find_nodes(op="placeholder")), list[Kept]()
    places, made = {node: number for number, node in enumerate(inputs)}, dict[int, fx.Node]()
    for target in OPERATORS:
        for node in graph.find_nodes(op="call_function", target=target):
            for name, matrix in _matrices(node).items():
                place = places.get(matrix)
                if place is None or place not in having:
                    why = "no parameter that the graph is given" if place is None else "it has no main gradient"
                    kept.append(Kept(module_of(node), f"{name} ({matrix.name}): {why}"))
                    continue
                if place not in made:
                    made[place] = inputs[-1] = _input(graph, matrix, inputs[-1])
                node.kwargs = {**node.kwargs, KEYWORDS[name]: made[place]}
    return [*made], kept


def _matrices(experts: fx.Node) -> dict[str, fx.Node]:
    """The experts' matrices that are there, by name."""
    found = {
        name: experts.args[place] if place < len(experts.args) else experts.kwargs.get(name)
        for name, place in PLACES.items()
    }
    return {name: matrix for name, matrix in found.items() if isinstance(matrix, fx.Node)}


def _input(graph: fx.Graph, matrix: fx.Node, last: fx.Node) -> fx.Node:
    """A new input behind the `last` one, for the main gradient of a matrix."""
    with graph.inserting_after(last):
        made = graph.placeholder(f"{matrix.name.rstrip('_')}_main_grad")
    made._dynamo_source = None  # AOTAutograd asks where inputs come from: not from the user's code
    like = fake_of(matrix)
    made.meta["example_value"] = empty_fake(like, tuple(like.shape), torch.float32)
    return made
