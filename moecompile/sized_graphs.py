"""Graphs of AOTAutograd's with numbers for their sizes.

A graph whose sizes are symbols is good for calls of many sizes; the symbols are those of its own trace. What is made of
a graph later, or of two, is made for the sizes of a call, in a trace of its own, and once more for those of another.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from moecompile.bodies import copy_tree
from moecompile.passes.aliases import fake_of
from moecompile.passes.costs import has_symbols, sizes_of
from moecompile.passes.pairs import known_when_run

log = logging.getLogger("moecompile")
MANY = 8
"""Sizes of one graph, from which on one is told that there are many."""
SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_numel.default)
"""Operators that give one."""


class SizedGraph:
    """A graph, for calls of one size after the other. It stays as it is where some are known only when it runs.

    Args:
        gm: of AOTAutograd's, with example values. It stays as it is.
        name: for people.
    """

    def __init__(self, gm: fx.GraphModule, name: str) -> None:
        self.whole, self._name = gm, name
        self._found: dict[tuple[Any, ...], fx.GraphModule] = {}
        inputs = gm.graph.find_nodes(op="placeholder")
        self._places = [place for place, node in enumerate(inputs) if has_symbols(fake_of(node))]
        self._changes = not known_when_run(gm.graph) and any(has_symbols(fake_of(node)) for node in gm.graph.nodes)

    def of(self, given: Sequence[Any]) -> fx.GraphModule:
        """For this call; the same object for all of its sizes.

        Args:
            given: what the graph would be called with.
        """
        if not self._changes:
            return self.whole
        key = tuple(tuple(sizes_of(given[place])) for place in self._places)
        if key not in self._found:
            self._found[key] = self._made(given)
            if len(self._found) == MANY + 1:
                log.warning(
                    "moecompile: a graph of %s has more than %d sizes in a pipeline, and what is made of it is "
                    "compiled for each of them: pad micro-batches to a few sizes",
                    self._name,
                    MANY,
                )
        return self._found[key]

    def _made(self, given: Sequence[Any]) -> fx.GraphModule:
        with unset_fake_temporarily():
            gm = copy_tree(self.whole)
        inputs = gm.graph.find_nodes(op="placeholder")
        for place in self._places:
            value = given[place]
            inputs[place].meta["val"] = value
            if not isinstance(value, Tensor):
                _replace(inputs[place], value)
        trace_again(gm)
        for node in list(gm.graph.nodes):
            if node.op == "call_function" and _computes_a_size(node):
                _replace(node, node.meta["val"])
                gm.graph.erase_node(node)
        gm.recompile()
        return gm


def trace_again(gm: fx.GraphModule) -> None:
    """Gives all nodes example values of one trace. Sizes of what comes in have to be numbers."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        inputs = [_like(fake_of(node)) for node in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs)


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _computes_a_size(node: fx.Node) -> bool:
    """Whether it does nothing but compute a number that is known now."""
    if type(node.meta.get("val")) is not int:
        return False
    return getattr(node.target, "__module__", "") == operator.add.__module__ or node.target in SIZES


def _replace(node: fx.Node, number: Any) -> None:
    """Has those that read a node read a number."""
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: number if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: number if n is node else n)
