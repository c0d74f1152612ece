"""Parameters of a pipeline's stage that are spread over ranks (DTensors): its graph is given this rank's parts of them.

AOTAutograd makes a DTensor of a parameter's gradient whenever the backward ends, and a stage whose gradients of
parameters come later has none yet. So parts are taken before the graph and become DTensors again behind its backward,
where nothing is made of a gradient that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from moecompile.lifting import own_graph, with_graph
from moecompile.passes.expert_parallel import is_local_part


class _Part(torch.autograd.Function):
    """A parameter's part of this rank. Its gradient becomes the parameter's, if it comes."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.like = parameter
        return parameter._local_tensor.view_as(parameter._local_tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> DTensor | None:
        (gradient,) = gradients
        return None if gradient is None else spread_like(ctx.like, gradient)


def parameter_at(edge: Any) -> nn.Parameter | None:
    """The parameter that a gradient goes to at an edge of autograd's, by itself or as a part; None if to another."""
    if edge is not None and edge.name() == f"{_Part.__name__}Backward":
        ((edge, _),) = edge.next_functions
    found = getattr(edge, "variable", None)
    return found if isinstance(found, nn.Parameter) else None


def spread_like(parameter: Tensor, gradient: Tensor) -> DTensor:
    """This rank's part of a gradient as the parameter's whole gradient."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        gradient,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def lift(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any], tuple[int, ...]]:
    """The graph with parts in the places of parameters of which it reads nothing else.

    Dynamo goes on reading its own graph, which stays as it is.

    Returns:
        the graph, the inputs of the call that is being compiled, and the places of such parameters.
    """
    places = _places(gm.graph, inputs)
    if not places:
        return gm, list(inputs), ()
    graph, found = own_graph(gm), list(inputs)
    given = list(graph.find_nodes(op="placeholder"))
    for place in places:
        part, *same = given[place].users
        example = part.meta["example_value"]
        found[place] = example.detach().requires_grad_()
        for each in (part, *same):
            each.replace_all_uses_with(given[place])
            graph.erase_node(each)
        given[place].meta["example_value"] = found[place]
    return with_graph(gm, graph), found, places


def with_parts(compiled: Callable[..., Any], places: Sequence[int]) -> Callable[..., Any]:
    """What takes a call's inputs and gives the compiled graph this rank's parts of those in these places."""
    if not places:
        return compiled

    def call(*given: Any) -> Any:
        found = list(given)
        for place in places:
            found[place] = _Part.apply(given[place])
        return compiled(*found)

    return call


def _places(graph: fx.Graph, inputs: Sequence[Any]) -> tuple[int, ...]:
    return tuple(
        place
        for place, (node, given) in enumerate(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
        if isinstance(given, nn.Parameter) and isinstance(given, DTensor) and given.requires_grad
        and node.users and all(map(_is_plain, node.users))
    )  # fmt: skip


def _is_plain(node: fx.Node) -> bool:
    """Whether it takes a part whose gradient is spread as the parameter is."""
    if not is_local_part(node) or len(node.args) > 1 or node.kwargs:
        return False
    given = [cell.cell_contents for cell in getattr(node.target, "__closure__", None) or ()]
    return not any(isinstance(each, (tuple, list, dict)) and each for each in given)
