"""Give the experts main gradients: float32 tensors, from outside the graph, that gradients of matrices are added to.

Contract
- On entry the experts are `moecompile::experts` or `moecompile::experts_fp8` (passes/fuse.py, passes/cast_experts.py),
  or with their exchange `moecompile::exchanged_experts` (passes/hide.py).
- A matrix gets one if it is a parameter that the graph gets as an input, or this rank's part of one (passes/
  expert_parallel.py), and that has one. Others keep their gradients, and are returned with the reason: so do parameters
  whose gradient becomes the mean over ranks after the experts, since what these would add is the sum.
- Inputs that there were keep their places; the new ones follow, one for each such parameter, in their order.

    moecompile.experts(x, ..., w_in, w_out, ...)
        becomes moecompile.experts(x, ..., w_in, w_out, ..., main_w_in=w_in_main_grad, main_w_out=w_out_main_grad)
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from moecompile.passes.aliases import fake_of
from moecompile.passes.casts import Kept
from moecompile.passes.expert_parallel import parameter_of
from moecompile.passes.provenance import input_name, module_of
from moecompile.runtime.main_gradients import KEYWORDS

OPERATORS = (
    torch.ops.moecompile.experts.default,
    torch.ops.moecompile.experts_fp8.default,
    torch.ops.moecompile.exchanged_experts.default,
)
PLACES = {"w_in": 5, "w_out": 6, "w_up": 7}
"""Of the matrices among the arguments of each of them."""
MEAN = (
    "has a gradient that is the mean over ranks, in a block some of whose parameters are on all ranks, and what is "
    'added is the sum: give shard_experts(gradients="sum"), and divide main_grad, or the loss'
)


@dataclass
class Added:
    """What was done.

    Attributes:
        inputs: the new ones, by the place of the parameter that each belongs to.
        names: of all inputs that are matrices of experts, by their places.
        kept: modules with a matrix whose gradient stays one, and why.
    """

    inputs: dict[int, fx.Node] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)


def add_main_gradients(graph: fx.Graph, having: Mapping[int, Tensor]) -> Added:
    """Rewrite the graph in place; the caller recompiles the GraphModule.

    Args:
        graph: of Dynamo's.
        having: the main gradients of the graph's inputs that have one, by their places.
    """
    inputs, done = list(graph.find_nodes(op="placeholder")), Added()
    places = {node: number for number, node in enumerate(inputs)}
    for target in OPERATORS:
        for node in graph.find_nodes(op="call_function", target=target):
            for name, matrix in _matrices(node).items():
                parameter = parameter_of(matrix)
                place = places.get(parameter)
                means = matrix.target is torch.ops.moecompile.mean_gradient.default
                if place is not None and not means:
                    done.names[place] = input_name(parameter)
                if why := MEAN if means else _obstacle(place, having):
                    done.kept.append(Kept(module_of(node), f"{name} ({input_name(parameter)}) {why}"))
                    continue
                assert place is not None
                if place not in done.inputs:
                    last = next(reversed(done.inputs.values()), inputs[-1])
                    done.inputs[place] = _input(graph, matrix, having[place], last)
                node.kwargs = {**node.kwargs, KEYWORDS[name]: done.inputs[place]}
    return done


def _obstacle(place: int | None, having: Mapping[int, Tensor]) -> str:
    """Why a parameter gets none; empty if it gets one."""
    if place is None:
        return "is no parameter that the graph is given"
    return "" if place in having else "has no main_grad"


def _matrices(experts: fx.Node) -> dict[str, fx.Node]:
    """The experts' matrices that are there, by name."""
    found = {
        name: experts.args[place] if place < len(experts.args) else experts.kwargs.get(name)
        for name, place in PLACES.items()
    }
    return {name: matrix for name, matrix in found.items() if isinstance(matrix, fx.Node)}


def _input(graph: fx.Graph, matrix: fx.Node, main: Tensor, last: fx.Node) -> fx.Node:
    """A new input behind the `last` one, for the main gradient of a matrix."""
    with graph.inserting_after(last):
        made = graph.placeholder(f"{matrix.name.rstrip('_')}_main_grad")
    made._dynamo_source = None  # AOTAutograd asks where inputs come from: not from the user's code
    like = fake_of(matrix)
    with like.fake_mode if isinstance(like, FakeTensor) else contextlib.nullcontext():
        example = torch.empty_strided(main.shape, main.stride(), dtype=main.dtype, device=main.device)
    made.meta["example_value"] = example
    return made
