"""Write our operators out as PyTorch's, so that Inductor fuses what lies between the experts' products.

Contract
- Works on AOTAutograd's graphs (meta["val"], functional), right before Inductor compiles them; returns how many nodes
  it replaced. The caller recompiles the GraphModule.
- The graph computes the same: what is written out is the reference itself, `moecompile.runtime.reference`, `.backward`
  and `.linear_fp8`, traced with rows whose number does not depend on the routing.
- Experts are left as they are where it would not help: products of another dtype than bfloat16, the one that
  `torch._grouped_mm` can be traced with on a CPU, another device, a number of rows that is symbolic or 0. `plan` stays.
- A cast of rows, `quantize`, is left where its kernel is as fast (`_is_worth_fusing`), or features are symbolic, or
  scales are no powers of two: compilers round divisions each in its own way, and casts are to have the same bits.

    for node in graph:
        traced = make_fx(reference)(its example values)      # aten operators, no mutation
        copy traced's nodes in front of node; its results replace node's
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moecompile.runtime import kernels, linear_fp8, main_gradients
from moecompile.runtime.contract import Arguments
from moecompile.runtime.grouped import aligned
from moecompile.runtime.quantize import BLOCK, POWER_OF_TWO

aten = torch.ops.aten
_SEEN_THROUGH = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
}
_COPIES = {aten.clone.default, aten.copy.default}
Decompositions = dict[Any, Callable[..., Any]]


class _Casts:
    """What holds for casts of rows in all threads: autograd's compile backward graphs, too."""

    fused = True


@contextlib.contextmanager
def casts_apart() -> Iterator[None]:
    """Within, casts of rows are left as they are: to be timed by themselves, or replaced."""
    before, _Casts.fused = _Casts.fused, False
    try:
        yield
    finally:
        _Casts.fused = before


def decompose(graph: fx.Graph, decompositions: Decompositions) -> int:
    """Writes out every operator of the graph that can be; `decompositions` are those Inductor asks for."""
    operators: dict[Any, tuple[Callable[..., Any], Callable[[fx.Node], bool]]] = {
        torch.ops.moecompile.experts.default: (kernels.experts, partial(_can_be_written_out, first=0)),
        torch.ops.moecompile.experts_forward.default: (kernels.experts_forward, partial(_can_be_written_out, first=0)),
        torch.ops.moecompile.experts_backward.default: (
            kernels.experts_backward,
            partial(_can_be_written_out, first=2),
        ),
        torch.ops.moecompile.quantize.default: (linear_fp8.quantize_in_torch, _is_worth_fusing),
    }
    count = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in operators:
            function, can_be_written_out = operators[node.target]
            if can_be_written_out(node):
                count += _write_out(graph, node, function, decompositions)
    return count


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _is_worth_fusing(node: fx.Node) -> bool:
    """Whether a cast of rows is better fused: always, but where our own kernel does it and little would be fused.

    Rows that others read, too, are written anyway; of those that are gathered from another layout Inductor's cast takes
    twice the time of the kernel's (docs/perf.md). On CPUs (torch 2.13) its code for blocks that are cut off is wrong:
    rows are whole blocks.
    """
    x = _value(node.args[0])
    features = x.shape[-1]
    whole = isinstance(features, int) and features % BLOCK == 0 and not (isinstance(x.numel(), int) and x.numel() == 0)
    exact = node.kwargs.get("scale_format", POWER_OF_TWO) == POWER_OF_TWO
    return _Casts.fused and exact and whole and (not linear_fp8.has_kernels(x.device) or is_computed_for(node))


def is_computed_for(cast: fx.Node) -> bool:
    """Whether a cast's rows are computed in their places, maybe rounded and seen in another shape, and for it alone."""
    node: Any = cast.args[0]
    while isinstance(node, fx.Node) and len(node.users) == 1 and node.target in _SEEN_THROUGH:
        node = node.args[0]
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return len(node.users) == 1 and torch.Tag.pointwise in node.target.tags and node.target not in _COPIES


def _can_be_written_out(node: fx.Node, first: int) -> bool:
    """Whether all products are ones that the CPU's `torch._grouped_mm` takes as they are, and there are rows."""
    args: Any = pytree.tree_map(_value, node.args[first:])
    attributes: Any = {name: _value(value) for name, value in node.kwargs.items() if name != "needs"}
    main_gradients.split(attributes)
    arguments = Arguments(*args, **attributes)
    matrices = [weight for weight in (arguments.w_in, arguments.w_up, arguments.w_out) if weight is not None]
    rows = arguments.order.shape[0]
    return (
        arguments.x.device.type == "cpu"
        and isinstance(rows, int)
        and rows > 0
        and all(matrix.dtype == torch.bfloat16 and aligned(matrix) for matrix in matrices)
        and all(extent * matrix.element_size() % 16 == 0 for matrix in matrices for extent in matrix.shape[1:])
    )


def _write_out(graph: fx.Graph, node: fx.Node, function: Callable[..., Any], decompositions: Decompositions) -> bool:
    """Puts the traced reference in the node's place, unless it holds a constant that the graph has no name for."""
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]

    def call(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        args, kwargs = pytree.tree_unflatten(filled, structure)
        with kernels.written_out():
            return function(*args, **kwargs)

    traced = _traced(call, [leaves[place].meta["val"] for place in places], decompositions)
    if traced.graph.find_nodes(op="get_attr"):
        return False
    known = dict(zip(traced.graph.find_nodes(op="placeholder"), (leaves[place] for place in places), strict=True))
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                known[inner] = graph.node_copy(inner, known.__getitem__)
    results = fx.node.map_arg(traced.graph.output_node().args[0], known.__getitem__)
    _replace(graph, node, results)
    return True


def _traced(call: Callable[..., Any], values: list[Tensor], decompositions: Decompositions) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad(), torch._guards.detect_fake_mode(values) or torch._subclasses.FakeTensorMode():
        traced = make_fx(torch.func.functionalize(call), decomposition_table=decompositions)(*values)
    traced.graph.eliminate_dead_code()
    return traced


def _replace(graph: fx.Graph, node: fx.Node, results: Any) -> None:
    """Gives the node's users the results: one tensor, or several that its users take by number."""
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem and isinstance(user.args[1], int)
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
