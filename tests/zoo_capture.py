"""Runs Dynamo on a module of the zoo and keeps what a backend would receive."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from zoo_case import TOKENS, Case, Refusal, arguments, make


@dataclass(frozen=True)
class Captured:
    """One graph as Dynamo hands it to a backend.

    Attributes:
        gm: the graph, a copy of its own, with FakeTensors in `meta["example_value"]`.
        inputs: the tensors and integers that it was first called with, one for each placeholder; copies.
        outputs: what the module returned in that call, flattened, detached.
    """

    gm: fx.GraphModule
    inputs: tuple[Any, ...]
    outputs: tuple[Tensor, ...]

    def fresh(self) -> Captured:
        """The same with a graph that may be rewritten."""
        return Captured(copied(self.gm), self.inputs, self.outputs)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with a copy of the graph; node metadata is shared entry by entry, submodules as they are."""
    graph = fx.Graph()
    result = graph.graph_copy(gm.graph, {}, return_output_node=True)
    assert isinstance(result, tuple), f"Dynamo's graphs have an output node, this one has none:\n{gm.graph}"
    values, old = result
    graph.output(values).meta = copy.copy(old.meta)
    return fx.GraphModule(gm, graph)


def separate(value: Any) -> Any:
    """A leaf with the same data and `requires_grad`; a symbolic size becomes the size it stands for."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def captured(module: nn.Module, inputs: tuple[Any, ...], fullgraph: bool = False, dynamic: bool = False) -> Captured:
    """Calls `module(*inputs)` under Dynamo.

    Raises:
        RuntimeError: Dynamo made no graph or several.
    """
    graphs: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append((copied(gm), tuple(separate(value) for value in example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    outputs = torch.compile(module, backend=backend, fullgraph=fullgraph, dynamic=dynamic or None)(*inputs)
    if len(graphs) != 1:
        raise RuntimeError(f"expected one graph of {type(module).__name__}, got {len(graphs)}; look for graph breaks")
    tensors = tuple(leaf.detach().clone() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
    return Captured(*graphs[0], tensors)


@functools.cache
def _captured_case(case: Case | Refusal, gradients: bool, dynamic: bool, tokens: int) -> Captured:
    module = make(case)
    inputs = tuple(value.requires_grad_(gradients) for value in arguments(case, tokens))
    torch.manual_seed(2)
    with torch.set_grad_enabled(gradients):
        return captured(module, inputs, case.fullgraph, dynamic)


def captured_case(case: Case | Refusal, dynamic: bool = False, tokens: int = TOKENS) -> Captured:
    """The graph of a case on its standard inputs; Dynamo runs once a process, the graph is the caller's to rewrite."""
    return _captured_case(case, not isinstance(case, Refusal) or case.backward, dynamic, tokens).fresh()
