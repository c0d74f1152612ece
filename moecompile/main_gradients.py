"""The option `main_grad`: gradients of the experts' matrices are added to `parameter.main_grad`, in float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moecompile.bodies import bodies_of, copy_graph, text_of
from moecompile.cached import with_graph
from moecompile.passes.main_gradients import OPERATORS, add_main_gradients
from moecompile.report import GraphReport

log = logging.getLogger("moecompile")

GIVE = "Before the first call give each one: parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)"
NESTED = "inside a checkpointed or another nested region gradients of matrices go to parameter.grad"
AGAIN = "call torch._dynamo.reset() and compile the model again"


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
    added, kept = add_main_gradients(graph, having)
    for each in kept:
        _say(record, f"a gradient of {each.module or 'the function'} goes to parameter.grad: {each.reason}. {GIVE}")
    nested = (body for path, body in bodies_of(gm).items() if path)
    if any(node.target in OPERATORS for body in nested for node in body.graph.nodes):
        _say(record, NESTED)
    if not added:
        return gm, list(inputs), []
    made = with_graph(gm, graph)
    record.notes.append(f"gradients of {len(added)} matrices are added to their parameters' main_grad")
    record.after = text_of(made)
    return made, [*inputs, *_of(added, inputs)], added


def with_main_gradients(
    compiled: Callable[..., Any], added: Sequence[int], inputs: Sequence[Any]
) -> Callable[..., Any]:
    """What takes a call's inputs and gives the compiled graph the main gradients as well.

    Args:
        compiled: the graph.
        added: of which inputs it takes the main gradients.
        inputs: of the call that it was compiled for.
    """
    expected = [_layout(main) for main in _of(added, inputs)]

    def call(*given: Any) -> Any:
        if torch.is_grad_enabled():
            _refuse_hooks()
        found = _of(added, given)
        for main, layout in zip(found, expected, strict=True):
            if _layout(main) != layout:
                words = f"a main_grad was {layout} when its graph was compiled, and is {_layout(main)} now"
                raise RuntimeError(f"moecompile: {words} (shape, strides, dtype, device): give it the same, or {AGAIN}")
        return compiled(*given, *found)

    return call if added else compiled


def _of(added: Sequence[int], given: Sequence[Any]) -> list[Tensor]:
    """The main gradients of those inputs of a call; raises RuntimeError where there is none any more."""
    found = list[Tensor]()
    for place in added:
        main = _main_of(given[place])
        if main is None:
            words = f"a parameter of shape {tuple(given[place].shape)} has no main_grad any more"
            raise RuntimeError(
                f"moecompile: {words}, which its compiled graph adds to: give it one of float32, or {AGAIN}"
            )
        # AOTAutograd saves it for the backward. Others write to it before: nobody is to count these writes
        found.append(main.data)
    return found


def _main_of(given: Any) -> Tensor | None:
    """The main gradient of an input that is a parameter and has one."""
    main = getattr(given, "main_grad", None) if isinstance(given, nn.Parameter) else None
    return main if isinstance(main, torch.Tensor) else None


def _layout(main: Tensor) -> Hashable:
    return tuple(main.shape), main.stride(), main.dtype, main.device


def _refuse_hooks() -> None:
    """Raises RuntimeError under hooks of saved tensors, which may give the backward copies; checkpoints give none."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint":
        raise RuntimeError(
            "moecompile: main_grad does not go with hooks of saved tensors (torch.autograd.graph.save_on_cpu, "
            "saved_tensors_hooks): what they unpack is a copy, and gradients added to it would be lost. Call the "
            "model outside of them, or leave one of the two out"
        )


def _say(record: GraphReport, note: str) -> None:
    log.warning("main_grad: %s", note)
    record.notes.append(f"main_grad: {note}")
