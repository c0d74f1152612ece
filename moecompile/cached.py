"""The option `fp8_cache_weights`: graphs are given their weights' FP8 copies, kept until the weights change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from moecompile.bodies import bodies_of, copy_graph, text_of
from moecompile.passes.cached_weights import Lifted, lift_casts
from moecompile.report import GraphReport
from moecompile.runtime.weight_copies import COPIES

log = logging.getLogger("moecompile")

SHARDED = (
    "the matrices are cast in every forward: FSDP writes parameters in ways that nobody counts, so that copies would "
    "grow old unseen"
)


def invalidate(model: nn.Module | None = None) -> None:
    """Says that parameters were changed behind PyTorch's back.

    Through `.data` (`vector_to_parameters`, `.half().bfloat16()`), by a collective (`dist.broadcast(parameter)`), by
    NumPy or another library's kernels. Their FP8 copies are made anew at the next call of a model compiled with
    `fp8_cache_weights`. Steps of PyTorch's optimizers, `load_state_dict` and operations in place are noticed by itself.

    Args:
        model: whose parameters; of all models if None.
    """
    COPIES.forget(None if model is None else model.parameters())


def lift(
    gm: fx.GraphModule, inputs: Sequence[Any], record: GraphReport
) -> tuple[fx.GraphModule, list[Any], list[Lifted]]:
    """The graph with its weights' copies as inputs of their own.

    Dynamo goes on reading its own graph, which stays as it is.

    Returns:
        the graph, the inputs of the call that is being compiled with those copies behind them, and what these are of.
    """
    if _sharded(inputs):
        _say(record, SHARDED)
        return gm, list(inputs), []
    graph, _ = copy_graph(gm.graph)
    for node in graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)  # Dynamo's own, which refers to the input, and which it clears in its graph
    lifted, kept = lift_casts(graph)
    for each in kept:
        _say(record, f"matrices of {each.module or 'the function'} are cast in every forward: {each.reason}")
    if any("quantize_weights" in str(node.target) for body in _bodies(gm) for node in body.graph.nodes):
        _say(record, "inside a checkpointed or another nested region matrices are cast in every forward")
    if not lifted:
        return gm, list(inputs), []
    made = with_graph(gm, graph)
    record.notes.append(f"FP8 copies of {sum(len(each.matrices) for each in lifted)} matrices are kept between calls")
    record.after = text_of(made)
    COPIES.watch_optimizers()
    return made, [*inputs, *_copies(lifted, inputs)], lifted


def with_copies(compiled: Callable[..., Any], lifted: Sequence[Lifted]) -> Callable[..., Any]:
    """What takes a call's inputs and gives the compiled graph the copies as well; the graph itself, if it has none."""

    def call(*given: Any) -> Any:
        return compiled(*given, *_copies(lifted, given))

    return call if lifted else compiled


def _copies(lifted: Sequence[Lifted], given: Sequence[Any]) -> list[Tensor]:
    """The copies of all matrices that a call's inputs hold, in the order of the graph's own inputs for them."""
    return [
        copy
        for each in lifted
        for copy in COPIES.of(
            tuple(given[place] for place in each.matrices), each.gate_up, each.transposed, each.backward
        )
    ]


def _bodies(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    return (body for path, body in bodies_of(gm).items() if path)


def with_graph(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """The same module around another graph, with what Dynamo notes beside it."""
    made = fx.GraphModule(gm, graph)
    made.meta.update(gm.meta)
    for name, value in vars(gm).items():
        if name not in vars(made):
            setattr(made, name, value)
    return made


def _sharded(inputs: Sequence[Any]) -> bool:
    """Whether some module of the process is under FSDP2, or some of the inputs under FSDP1."""
    from torch.distributed._composable_state import _module_state_mapping

    states = [reference() for reference in _module_state_mapping.values()]
    flattened = any(getattr(each, "_fsdp_flattened", False) for each in inputs)
    return flattened or any(type(state).__name__ == "FSDPState" for state in states)


def _say(record: GraphReport, note: str) -> None:
    log.warning("fp8_cache_weights: %s", note)
    record.notes.append(f"fp8_cache_weights: {note}")
