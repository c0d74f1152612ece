"""The option `fp8_cache_weights`: graphs are given their weights' FP8 copies, kept until the weights change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, fx, nn

from moecompile.bodies import text_of
from moecompile.lifting import nested_nodes, own_graph, say, with_graph
from moecompile.passes.cached_weights import Lifted, lift_casts
from moecompile.remarks import listed
from moecompile.report import GraphReport
from moecompile.runtime.weight_copies import COPIES

OPTION = "fp8_cache_weights"

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

    Raises:
        TypeError: it is no module.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"moecompile.invalidate: expected a module, or nothing for all models, got {model!r}")
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
        say(record, OPTION, SHARDED)
        return gm, list(inputs), []
    graph = own_graph(gm)
    lifted, kept = lift_casts(graph)
    for reason in dict.fromkeys(each.reason for each in kept):
        where = listed(each.module or "the function" for each in kept if each.reason == reason)
        say(record, OPTION, f"matrices of {where} are cast in every forward: {reason}")
    if any("quantize_weights" in str(node.target) for node in nested_nodes(gm)):
        say(record, OPTION, "inside a checkpointed or another nested region matrices are cast in every forward")
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
        for copy in COPIES.of(tuple(given[place] for place in each.matrices), **asdict(each.how))
    ]


def _sharded(inputs: Sequence[Any]) -> bool:
    """Whether some module of the process is under FSDP2, or some of the inputs under FSDP1."""
    from torch.distributed._composable_state import _module_state_mapping

    states = [reference() for reference in _module_state_mapping.values()]
    flattened = any(getattr(each, "_fsdp_flattened", False) for each in inputs)
    return flattened or any(type(state).__name__ == "FSDPState" for state in states)
