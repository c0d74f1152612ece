"""Take the casts of parameters out of a graph: what they give comes in, made once until the parameters change.

Contract
- On entry matrices are cast by `moecompile::quantize_weights` (passes/cast_experts.py, passes/cast_linears.py).
- A cast is taken out if its matrices are parameters that the graph gets as inputs and does not write, or what this rank
  has of such. Others stay, with the reason; so do those of matrices that are kept in FP8 anyway.
- Experts are told that somebody holds the copies of their first matrices.
- Inputs that there were keep their places; the new ones follow, four for each cast that is taken out, in their order.

    in_ = moecompile.quantize_weights(w_in, gate_up="halves")
        becomes the inputs w_in_fp8_values, w_in_fp8_scales, w_in_fp8_values_t, w_in_fp8_scales_t
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moecompile.passes.aliases import fake_of
from moecompile.passes.casts import Kept, MatrixCast
from moecompile.passes.expert_parallel import parameter_of
from moecompile.passes.layout import Layout
from moecompile.passes.provenance import module_of
from moecompile.runtime.block_scaled import BlockScaled

HOLDING = (torch.ops.moecompile.experts_fp8.default, torch.ops.moecompile.exchanged_experts.default)
"""Experts, which are told that somebody holds what is cast."""
RESULTS = ("values", "scales", "values_t", "scales_t")


@dataclass(frozen=True)
class Lifted:
    """A cast that is no longer in the graph.

    Attributes:
        matrices: which of the graph's inputs it casts: one, or gate and up projection.
        how: it casts them.
    """

    matrices: tuple[int, ...]
    how: MatrixCast


def lift_casts(graph: fx.Graph) -> tuple[list[Lifted], list[Kept]]:
    """Rewrite the graph in place; returns what was lifted and what was not. The caller recompiles the GraphModule."""
    places = {node: number for number, node in enumerate(graph.find_nodes(op="placeholder"))}
    layout, last = Layout(graph), next(reversed(places), None)
    lifted, kept = dict[Lifted, list[fx.Node]](), list[Kept]()
    for node in graph.find_nodes(op="call_function", target=torch.ops.moecompile.quantize_weights.default):
        matrices = [
            parameter_of(argument) for argument in (*node.args, node.kwargs.get("w_up")) if argument is not None
        ]
        if all(isinstance(fake_of(each), BlockScaled) for each in matrices):
            continue  # there is nothing to cast
        reason = _obstacle(matrices, places, layout)
        if reason:
            kept.append(Kept(module_of(node), reason))
            continue
        assert last is not None  # matrices are inputs
        one = Lifted(tuple(places[each] for each in matrices), MatrixCast.of(node))
        if one not in lifted:  # experts that are used twice are cast once
            lifted[one] = _inputs(graph, node, f"{matrices[0].name.rstrip('_')}_fp8", len(lifted), last)
            last = lifted[one][-1]
        _replace(graph, node, lifted[one])
    return [*lifted], kept


def _obstacle(matrices: Sequence[fx.Node], places: dict[fx.Node, int], layout: Layout) -> str:
    """Why a cast of these has to stay, if it has to."""
    if any(each.target is torch.stack for each in matrices):
        return "experts are modules of their own; put their matrices into one parameter"
    if not all(each in places and isinstance(fake_of(each), nn.Parameter) for each in matrices):
        return "they are no parameters that the graph is given"
    for target in (target for targets in layout.writers.values() for target in targets):
        if any(layout.aliases.share(target, each) for each in matrices):
            return f"{target} is written in the graph itself"
    return ""


def _inputs(graph: fx.Graph, cast: fx.Node, name: str, number: int, last: fx.Node) -> list[fx.Node]:
    """New inputs behind the `last` one for a cast's results."""
    taken, made = {node.target for node in graph.find_nodes(op="placeholder")}, list[fx.Node]()
    name = f"{name}_{number}" if f"{name}_{RESULTS[0]}" in taken else name
    for part, result in zip(_parts(cast), RESULTS, strict=True):
        with graph.inserting_after(last):
            last = graph.placeholder(f"{name}_{result}")
        last._dynamo_source = None  # AOTAutograd asks where inputs come from: not from the user's code
        last.meta.update(part.meta)
        made.append(last)
    return made


def _replace(graph: fx.Graph, cast: fx.Node, inputs: list[fx.Node]) -> None:
    first, *_ = parts = _parts(cast)
    for user in list(first.users):
        copies: Any = user.kwargs.get("quantized")
        if user.target in HOLDING and first is copies[0]:
            user.update_kwarg("held", True)
    for part, result in zip(parts, inputs, strict=True):
        part.replace_all_uses_with(result)
        graph.erase_node(part)
    graph.erase_node(cast)


def _parts(cast: fx.Node) -> list[fx.Node]:
    """The results of a cast, in their order."""
    parts: dict[object, fx.Node] = {part.args[1]: part for part in cast.users if part.target is operator.getitem}
    return [parts[number] for number in range(len(RESULTS))]
