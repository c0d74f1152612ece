"""Arguments of moecompile's operators in AOTAutograd's graphs, by name.

An operator that writes into arguments, as the backwards that add to main gradients do, is an argument of AOTAutograd's
`auto_functionalized_v2` there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2


def calls_of(graph: fx.Graph, operator: Any) -> list[fx.Node]:
    """All of an operator's, in their order."""
    return [node for node in graph.nodes if node.op == "call_function" and operator_of(node) is operator]


def operator_of(node: fx.Node) -> Any:
    """What the node calls, maybe by AOTAutograd's operator."""
    return node.args[0] if node.target is FUNCTIONALIZED else node.target


def argument(node: fx.Node, name: str) -> Any:
    """What it is given under that name; the default if nothing."""
    if node.target is not FUNCTIONALIZED:
        place, default = _place(node, name)
        if place < len(node.args):
            return node.args[place]
        return node.kwargs.get(name, default)
    return node.kwargs[name]


def give(node: fx.Node, name: str, value: Any) -> None:
    """Gives it that instead. What it was traced with is forgotten: Inductor would lay inputs out so."""
    node.meta.pop("eager_input_vals", None)
    if node.target is not FUNCTIONALIZED:
        place, _ = _place(node, name)
        if place < len(node.args):
            node.update_arg(place, value)
            return
    node.update_kwarg(name, value)


def _place(node: fx.Node, name: str) -> tuple[int, Any]:
    """Among the operator's arguments, and the default."""
    target: Any = node.target
    place, found = next((n, each) for n, each in enumerate(target._schema.arguments) if each.name == name)
    return place, found.default_value
