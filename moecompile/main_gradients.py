"""The option `main_grad`: gradients of the experts' matrices are added to `parameter.main_grad`, in float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moecompile.bodies import copy_graph, text_of
from moecompile.cached import with_graph
from moecompile.passes.main_gradients import add_main_gradients
from moecompile.report import GraphReport

log = logging.getLogger("moecompile")

NOBODY = (
    "main_grad: no matrix of experts in this graph is a parameter that has a main gradient. Before the first call give "
    "each one: parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)"
)


def lift(gm: fx.GraphModule, inputs: Sequence[Any], record: GraphReport) -> tuple[fx.GraphModule, list[Any], list[int]]:
    """The graph with main gradients as inputs of their own.

    Dynamo goes on reading its own graph, which stays as it is.

    Returns:
        the graph, the inputs of the call that is being compiled with the main gradients behind them, and of which
        inputs these are.
    """
    having = [place for place, each in enumerate(inputs) if _main_of(each) is not None]
    graph, _ = copy_graph(gm.graph)
    for node in graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)  # Dynamo's own, which refers to the input, and which it clears in its graph
    added = add_main_gradients(graph, having)
    if not added:
        if record.sites:
            log.warning(NOBODY)
            record.notes.append(NOBODY)
        return gm, list(inputs), []
    made = with_graph(gm, graph)
    record.notes.append(f"gradients of {len(added)} matrices are added to their parameters' main_grad")
    record.after = text_of(made)
    return made, [*inputs, *_of(added, inputs)], added


def with_main_gradients(compiled: Callable[..., Any], added: Sequence[int]) -> Callable[..., Any]:
    """What takes a call's inputs and gives the compiled graph the main gradients as well."""

    def call(*given: Any) -> Any:
        return compiled(*given, *_of(added, given))

    return call if added else compiled


def _of(added: Sequence[int], given: Sequence[Any]) -> list[Tensor]:
    """The main gradients of those inputs of a call; raises RuntimeError where there is none any more."""
    found = list[Tensor]()
    for place in added:
        main = _main_of(given[place])
        if main is None:
            words = f"a parameter of shape {tuple(given[place].shape)} has no main_grad any more"
            raise RuntimeError(
                f"moecompile: {words}, which its compiled graph adds to: give it one of float32, or call "
                "torch._dynamo.reset() and compile the model again"
            )
        found.append(main)
    return found


def _main_of(given: Any) -> Tensor | None:
    """The main gradient of an input that is a parameter and has one."""
    main = getattr(given, "main_grad", None) if isinstance(given, nn.Parameter) else None
    return main if isinstance(main, torch.Tensor) else None
