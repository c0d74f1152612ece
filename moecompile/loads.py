"""The option `expert_load`: how many tokens each expert was assigned, counted on the device.

A block's load is a tensor that lies with its experts: an attribute of the parameter that is its first matrix. Compiled
graphs get it as an input and add to it, so that it is the same one for all graphs of a layer, recompiled or not, and
layers that share a graph have one each.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moecompile.bodies import bodies_of, text_of
from moecompile.lifting import own_tree, say
from moecompile.passes.expert_loads import OPERATORS, add_expert_loads
from moecompile.report import GraphReport

OPTION = "expert_load"

FLATTENED = (
    "no experts are counted: FullyShardedDataParallel gives the model other tensors in each forward, and nobody knows "
    "whose they are. Use fully_shard"
)

ATTRIBUTE = "_moecompile_expert_load"
"""Of a parameter: the loads of the blocks whose first matrices begin with it, each behind the other matrices.

Nothing but plain tensors and tuples, which somebody who saves whole parameters can load anywhere. Not a table of weak
references: what has such cannot be swapped, as `Module.to` does with DTensors.
"""

SPLIT = "_moecompile_splits_tokens"
"""Of a module of experts: whether ranks that have the same tokens compute some each, and an odd one more than once."""

Loads = list[tuple[tuple[nn.Parameter, ...], Tensor]]


@dataclass(frozen=True)
class Lifted:
    """A load that a compiled graph takes beside its inputs.

    Attributes:
        places: of the block's first matrices among the inputs.
        num_experts: its length.
        device: where it is.
    """

    places: tuple[int, ...]
    num_experts: int
    device: torch.device


def expert_load(model: nn.Module) -> dict[str, Tensor]:
    """How many tokens each expert was assigned, in every block that has run compiled with the option `expert_load`.

    These are the tensors that compiled graphs add to: nothing is copied, and nobody waits for the device. Clear them
    in place, `load.zero_()`; reading a number on the host waits, as with any tensor. Of experts that ranks share, each
    rank counts its own tokens' assignments, to all ranks' experts: a copy summed over ranks is the load of all.

    Args:
        model: that was compiled, or the part of it that is asked about.

    Returns:
        the path of the module that holds a block's experts, as in `model.named_modules()`, with the block's load: (E,)
        int64. Where one module holds several blocks, their first matrices' names, as in `model.named_parameters()`.

    Raises:
        TypeError: it is no module.
        RuntimeError: ranks share out the tokens of a block that all of them have, in parts that may overlap
            (`register_transformers` with `tp_size`): what they count does not add up.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"moecompile.expert_load: expected the module that was compiled, got {model!r}")
    model = getattr(model, "_orig_mod", model)  # inside of what torch.compile(model) returns
    parameters = _named(model)
    names = {id(each): name for name, each in parameters}
    found = [
        ([name, *(names[id(other)] for other in others)], load)
        for name, each in parameters
        for others, load in _loads_of(each)
        if all(id(other) in names for other in others)
    ]
    for matrices, _ in found:
        path = _owner(matrices)
        if getattr(model.get_submodule(path), SPLIT, False):
            raise RuntimeError(
                f"moecompile.expert_load: expected ranks with tokens of their own, got {path}, whose ranks compute "
                "parts of the same tokens that may overlap: load the model without tp_size, or count in its router"
            )
    paths = Counter(_owner(matrices) for matrices, _ in found)
    return {
        path if paths[path] == 1 else ", ".join(matrices): load
        for matrices, load in found
        for path in [_owner(matrices)]
    }


def lift(
    gm: fx.GraphModule, inputs: Sequence[Any], record: GraphReport
) -> tuple[fx.GraphModule, list[Any], tuple[Lifted, ...]]:
    """The graph with its blocks' loads as inputs of their own.

    Dynamo goes on reading its own graph, which stays as it is.

    Returns:
        the graph, the inputs of the call that is being compiled with examples of loads behind them, and what they are.
    """
    if any(getattr(each, "_fsdp_flattened", False) for each in inputs):
        say(record, OPTION, FLATTENED)
        return gm, list(inputs), ()
    made = own_tree(gm)
    done = add_expert_loads(made)
    for kept in done.kept:
        say(record, OPTION, f"the experts of {kept.module or 'the function'} are not counted: {kept.reason}")
    nodes = (node for body in bodies_of(gm).values() for node in body.graph.nodes)
    left = len(record.sites) - sum(node.target in OPERATORS for node in nodes)
    if left > 0:
        say(record, OPTION, f"{left} of {len(record.sites)} blocks are not counted: they were found, and not rewritten")
    if record.near_misses:
        say(record, OPTION, f"near misses are not counted: {len(record.near_misses)} of them are in this graph")
    if not done.loads:
        return gm, list(inputs), ()
    record.notes.append(
        f"assignments to the experts of {done.blocks} {'block' if done.blocks == 1 else 'blocks'} are counted: "
        "moecompile.expert_load(model) has them"
    )
    record.after = text_of(made)
    examples = [node.meta["example_value"] for node in done.loads.values()]
    lifted = [Lifted(places, each.shape[0], each.device) for places, each in zip(done.loads, examples, strict=True)]
    return made, [*inputs, *examples], tuple(lifted)


def with_loads(compiled: Callable[..., Any], lifted: Sequence[Lifted]) -> Callable[..., Any]:
    """What takes a call's inputs and gives the compiled graph the loads as well; the graph itself, if it has none."""

    def call(*given: Any) -> Any:
        # in a backward, a checkpoint around the compiled model computes again what has been counted
        load_of = _no_load if torch._C._current_graph_task_id() != -1 else _load
        return compiled(*given, *(load_of(each, tuple(given[place] for place in each.places)) for each in lifted))

    return call if lifted else compiled


def _load(lifted: Lifted, matrices: tuple[nn.Parameter, ...]) -> Tensor:
    """The load of the block with these first matrices, made at its first call."""
    first, *others = matrices
    loads = _loads_of(first)
    for those, load in loads:
        if len(those) == len(others) and all(map(operator.is_, those, others)) and load.device == lifted.device:
            return load
    made = _zeros(lifted.num_experts, lifted.device)
    # of this device alone: what was moved begins anew
    kept = [each for each in loads if each[1].device == lifted.device]
    setattr(first, ATTRIBUTE, [*kept, (tuple(others), made)])
    return made


def _no_load(lifted: Lifted, _: tuple[nn.Parameter, ...]) -> Tensor:
    return _nobodys(lifted.num_experts, lifted.device)


@functools.cache
def _nobodys(num_experts: int, device: torch.device) -> Tensor:
    """What is added to and never read; it stays where it is, as loads do."""
    return _zeros(num_experts, device)


def _zeros(num_experts: int, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "moecompile: expert_load: a load cannot be made while a CUDA graph is captured, which would clear it in "
            "every replay. Call the model once before, as for any capture"
        )
    with torch.inference_mode(False):  # else nobody could write it outside of inference mode
        return torch.zeros(num_experts, dtype=torch.int64, device=device)


def _loads_of(parameter: nn.Parameter) -> Loads:
    found: Loads = getattr(parameter, ATTRIBUTE, [])
    return found


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters of a model by name, in their order, as compiled graphs get them."""
    gathered = _gathered_by_fsdp()
    return [(name, gathered.get(id(parameter), parameter)) for name, parameter in _parameters(model)]


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As `named_parameters`, but those that ranks share are what they are, and not gathered."""
    seen = set[int]()
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter


def _gathered_by_fsdp() -> dict[int, nn.Parameter]:
    """What FSDP2 has in a parameter's place while the model runs, by the ids of both: the model has one of them."""
    from torch.distributed._composable_state import _module_state_mapping

    states = [reference() for reference in _module_state_mapping.values()]
    groups = [group for state in states if type(state).__name__ == "FSDPState" for group in _groups(state)]
    return {
        id(parameter): each._unsharded_param
        for group in groups
        for each in group.fsdp_params
        if hasattr(each, "_unsharded_param")
        for parameter in (each.sharded_param, each._unsharded_param)
    }


def _groups(state: Any) -> list[Any]:
    """Several since torch 2.12, one before."""
    if hasattr(state, "_fsdp_param_groups"):
        return [*state._fsdp_param_groups]
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _owner(matrices: Sequence[str]) -> str:
    """The path of the module that holds matrices of these names, all of them."""
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in matrices), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
