"""What passes over AOTAutograd's graph of forward and backward share: its operators, and their arguments by name.

An operator that writes into arguments, as the backwards that add to main gradients do, is an argument of AOTAutograd's
`auto_functionalized_v2` there.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moecompile.passes.casts import computed

ops = torch.ops.moecompile
BACKWARDS = (ops.experts_backward.default, ops.experts_backward_adding.default)
BACKWARDS_FP8 = (ops.experts_fp8_backward.default, ops.experts_fp8_backward_adding.default)
EXCHANGED_BACKWARDS = (ops.exchanged_experts_backward.default, ops.exchanged_experts_backward_adding.default)
FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2
INPUTS = "eager_input_vals"
"""What an operator was traced with: Inductor lays its inputs out so."""


def calls_of(graph: fx.Graph, operator: Any) -> list[fx.Node]:
    """All of an operator's, in their order."""
    return [node for node in graph.nodes if node.op == "call_function" and operator_of(node) is operator]


def operator_of(node: fx.Node) -> Any:
    """What the node calls, maybe by AOTAutograd's operator."""
    return node.args[0] if node.target is FUNCTIONALIZED else node.target


def packet_of(node: fx.Node) -> Any:
    """The same without its overload; what is no operator of a library as it is."""
    target = operator_of(node)
    return getattr(target, "overloadpacket", target)


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
    node.meta.pop(INPUTS, None)
    if node.target is not FUNCTIONALIZED:
        place, _ = _place(node, name)
        if place < len(node.args):
            node.update_arg(place, value)
            return
    node.update_kwarg(name, value)


def forget_how_it_was_traced(node: fx.Node) -> None:
    """Gives it the example value of what it computes now, and its parts theirs. Inductor lays its inputs out anew."""
    node.meta.pop(INPUTS, None)
    node.meta["val"] = computed(node)
    _hand_on(node)


def _hand_on(node: fx.Node) -> None:
    """A node's example value to its parts, and to theirs."""
    for part in node.users:
        if part.target is operator.getitem:
            part.meta["val"] = node.meta["val"][part.args[1]]
            _hand_on(part)


def _place(node: fx.Node, name: str) -> tuple[int, Any]:
    """Among the operator's arguments, and the default."""
    target: Any = node.target
    place, found = next((n, each) for n, each in enumerate(target._schema.arguments) if each.name == name)
    return place, found.default_value
