"""What passes over AOTAutograd's graph of forward and backward share: operators' arguments by name, and new calls.

An operator that writes into arguments, as the backwards that add to main gradients do, is an argument of AOTAutograd's
`auto_functionalized_v2` there.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moecompile.passes.aliases import fake_of
from moecompile.passes.casts import call_for

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


def forget_how_it_was_traced(node: fx.Node) -> None:
    """Gives it the example value of what it computes now, and its parts theirs. Inductor lays its inputs out anew."""
    node.meta.pop("eager_input_vals", None)
    node.meta["val"] = _computed(node)
    for part in node.users:
        if part.target is operator.getitem:
            part.meta["val"] = node.meta["val"][part.args[1]]


def call(like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """A call at the graph's place of insertion, with its example value, that says it comes from where `like` does."""
    made = call_for(like, target, args, kwargs)
    made.meta["val"] = _computed(made)
    return made


def parts(like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[fx.Node]:
    """The results of such a call of an operator that has several."""
    made = call(like, target, args, kwargs)
    found = [call_for(like, operator.getitem, (made, number), {}) for number in range(len(made.meta["val"]))]
    for part, value in zip(found, made.meta["val"], strict=True):
        part.meta["val"] = value
    return found


def _computed(node: fx.Node) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake_of)
    first: Any = next(each for each in args if isinstance(each, torch.Tensor))
    with first.fake_mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _place(node: fx.Node, name: str) -> tuple[int, Any]:
    """Among the operator's arguments, and the default."""
    target: Any = node.target
    place, found = next((n, each) for n, each in enumerate(target._schema.arguments) if each.name == name)
    return place, found.default_value
