"""One graph of a captured tree, to be looked at: bodies of checkpoints and nested regions in their callers' places.

Contract
- Changes nothing: it is a copy, whose nodes are known by what they are copies of. Meta is shared.
- A body that is called in a way that is not known (control flow) comes behind, with inputs of its own, and its results
  leave the graph.

    y = tag_activation_checkpoint(body, x, W)           body: s = linear(x, W); return (s,)
    topk(y[0], 8)                                       becomes  s = linear(x, W); topk(s, 8)
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator

INLINED = frozenset(
    "tag_activation_checkpoint wrap_activation_checkpoint invoke_subgraph wrap wrap_with_autocast "
    "wrap_with_set_grad_enabled".split()
)
"""Operators that call the one body among their arguments with the arguments behind it."""


@dataclass
class Flat:
    """A flat copy.

    Attributes:
        graph: the copy.
        origins: what each of its nodes is a copy of, in whichever body.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    origins: dict[fx.Node, fx.Node] = field(default_factory=dict)


def flatten(gm: fx.GraphModule) -> Flat:
    """The flat copy of a graph of Dynamo's and all bodies below it that are used."""
    flat, leaving = Flat(), list[Any]()
    leaving.append(_copy(flat, gm, None, leaving))
    flat.graph.output(tuple(leaving))
    return flat


def _copy(flat: Flat, gm: fx.GraphModule, inputs: list[Any] | None, leaving: list[Any]) -> Any:
    """Copies a body behind what there is; returns its results, as what its caller has of them."""
    known, given = dict[fx.Node, Any](), iter(inputs or ())
    bodies = dict[fx.Node, fx.GraphModule]()

    def mapped(argument: Any) -> Any:
        return fx.node.map_arg(argument, known.__getitem__)

    for node in gm.graph.nodes:
        if node.op == "output":
            return mapped(node.args[0])
        if node.op == "placeholder" and inputs is not None:
            known[node] = next(given)
            continue
        if (body := body_of(gm, node)) is not None:
            bodies[node] = body
        called = called_by(node, bodies)
        if called is not None:
            body, operands = called
            known[node] = _copy(flat, body, [mapped(each) for each in operands], leaving)
            continue
        results = known.get(node.args[0]) if node.target is operator.getitem else None
        if isinstance(results, tuple | list):
            known[node] = results[node.args[1]]
            continue
        if isinstance(node.target, HigherOrderOperator):
            leaving += [_copy(flat, bodies[each], None, leaving) for each in node.all_input_nodes if each in bodies]
        known[node] = flat.graph.node_copy(node, known.__getitem__)
        flat.origins[known[node]] = node
    raise AssertionError("a graph without an output")


def body_of(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The body that a node takes from its graph module."""
    if node.op != "get_attr":
        return None
    found: Any = functools.reduce(getattr, str(node.target).split("."), gm)
    return found if isinstance(found, fx.GraphModule) else None


def called_by(
    node: fx.Node, bodies: Mapping[fx.Node, fx.GraphModule]
) -> tuple[fx.GraphModule, tuple[fx.node.Argument, ...]] | None:
    """The body that a node calls and what it gives to it, if its arguments are the body's inputs.

    Args:
        node: of any operation.
        bodies: those that nodes of its graph take from its graph module.
    """
    if not isinstance(node.target, HigherOrderOperator) or node.target.name() not in INLINED:
        return None
    places = [place for place, each in enumerate(node.args) if isinstance(each, fx.Node) and each in bodies]
    if len(places) != 1:
        return None
    body = bodies[node.args[places[0]]]  # type: ignore[index]  # it is a node
    operands = tuple(each for each in node.args[places[0] + 1 :] if not isinstance(each, str))
    fits = len(operands) == len(body.graph.find_nodes(op="placeholder"))
    return (body, operands) if fits else None
