"""The option `main_grad`: gradients of the experts' matrices are added to `parameter.main_grad`, in float32.

Main gradients are inputs of the compiled graph, which its backward writes. AOTAutograd saves them for it, and it adds
to them whatever it is asked for: so it is refused where sums would be lost, or go where nobody asked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moecompile.bodies import text_of
from moecompile.lifting import nested_nodes, own_graph, say, with_graph
from moecompile.passes.main_gradients import MEAN, OPERATORS, add_main_gradients
from moecompile.report import GraphReport

OPTION = "main_grad"

GIVEN = "torch.zeros_like(parameter, dtype=torch.float32)"
GIVE = f"Before the first call give it one: parameter.main_grad = {GIVEN}"
NESTED = "inside a checkpointed or another nested region gradients of matrices go to parameter.grad"
AGAIN = "call torch._dynamo.reset() and compile the model again"
HOOKS = (
    "main_grad does not go with hooks of saved tensors (torch.autograd.graph.save_on_cpu, saved_tensors_hooks): what "
    "they unpack is a copy, and gradients added to it would be lost. Call the model outside of them, or leave one of "
    "the two out"
)


@dataclass(frozen=True)
class Lifted:
    """What a compiled graph takes beside its inputs.

    Attributes:
        layouts: of the main gradients, by the places of their parameters among the inputs, in the graph's order.
        names: of all inputs that are matrices of experts, by their places.
    """

    layouts: Mapping[int, Hashable]
    names: Mapping[int, str]


def lift(
    gm: fx.GraphModule, inputs: Sequence[Any], record: GraphReport
) -> tuple[fx.GraphModule, list[Any], Lifted | None]:
    """The graph with main gradients as inputs of their own; as it was where nobody may differentiate it.

    Dynamo goes on reading its own graph, which stays as it is.

    Returns:
        the graph, the inputs of the call that is being compiled with examples of main gradients behind them, and what
        they are.

    Raises:
        TypeError, ValueError: something else than a main gradient.
    """
    if not torch.is_grad_enabled():
        return gm, list(inputs), None
    having = {place: main for place, each in enumerate(inputs) if (main := _main_of(each)) is not None}
    graph = own_graph(gm)
    done = add_main_gradients(graph, having)
    for each in done.kept:
        say(
            record,
            OPTION,
            f"a gradient of {each.module or 'the function'} goes to parameter.grad: {each.reason}"
            f"{'' if each.reason.endswith(MEAN) else f'. {GIVE}'}",
        )
    if any(node.target in OPERATORS for node in nested_nodes(gm)):
        say(record, OPTION, NESTED)
    for place in done.inputs:
        _check(done.names[place], having[place], inputs[place])
    lifted = Lifted({place: _layout(having[place]) for place in done.inputs}, done.names)
    if not done.inputs:
        return gm, list(inputs), lifted if done.names else None
    made = with_graph(gm, graph)
    count = len(done.inputs)
    record.notes.append(f"gradients of {count} {'matrix' if count == 1 else 'matrices'} are added to a main_grad")
    record.after = text_of(made)
    # examples, not these very tensors: those that share one buffer would be compiled as parts of it
    return made, [*inputs, *(node.meta["example_value"] for node in done.inputs.values())], lifted


def with_main_gradients(compiled: Callable[..., Any], lifted: Lifted | None) -> Callable[..., Any]:
    """What takes a call's inputs and gives the compiled graph the main gradients as well."""
    if lifted is None:
        return compiled

    def call(*given: Any) -> Any:
        found = _of(lifted, given)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) if found else None
        if hooks is not None and getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint":
            raise RuntimeError(f"moecompile: {HOOKS}")
        # AOTAutograd saves them for the backward. Others write to them before: nobody is to count these writes
        results = compiled(*given, *(main.data for main in found))
        _watch_backward(results, [(given[place], main) for place, main in zip(lifted.layouts, found, strict=True)])
        return results

    return call


def _of(lifted: Lifted, given: Sequence[Any]) -> list[Tensor]:
    """The main gradients of a call; raises RuntimeError if they are not what the graph was compiled for."""
    for place, name in lifted.names.items():
        if (_main_of(given[place]) is not None) != (place in lifted.layouts):
            had, has = ("one", "none") if place in lifted.layouts else ("none", "one")
            raise RuntimeError(
                f"moecompile: main_grad: the parameter {name} had {had} when its graph was compiled, and has {has} now "
                "(layers that are compiled by themselves share graphs). Give all of them one before the first call, or "
                f"{AGAIN}"
            )
    found = [_local(given[place].main_grad) for place in lifted.layouts]
    for main, (place, layout) in zip(found, lifted.layouts.items(), strict=True):
        if _layout(main) != layout:
            raise RuntimeError(
                f"moecompile: the main_grad of {lifted.names[place]} was {layout} when its graph was compiled, and is "
                f"{_layout(main)} now (shape, strides, dtype, device): give it the same, or {AGAIN}"
            )
    ends = 0
    for begin, end in sorted((main.data_ptr(), _end(main)) for main in found):
        if begin < ends:
            names = ", ".join(lifted.names[place] for place in lifted.layouts)
            raise RuntimeError(f"moecompile: main gradients of {names} overlap in memory: give each its own part")
        ends = end
    return found


def _watch_backward(results: Iterable[Any], pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Has the backward refuse what it would do wrong."""
    node = _backward_of(results) if pairs else None
    if node is None:
        return

    def check(_: Any) -> None:
        for parameter, main in pairs:
            now = _main_of(parameter)
            if now is None or now.data_ptr() != main.data_ptr():
                raise RuntimeError(
                    "moecompile: a main_grad was taken away or given anew between a forward and its backward, which "
                    "adds to the former one. Clear it in place: parameter.main_grad.zero_()"
                )
            if not _is_asked_for(parameter):
                raise RuntimeError(
                    "moecompile: this backward asks for gradients of other tensors alone (torch.autograd.grad, or "
                    "backward(inputs=...)), and would add to main gradients all the same. Call backward() without "
                    "inputs, or compile the model for this without main_grad. (PyTorch does so to learn the sizes of a "
                    "pipeline's stages: give PipelineStage input_args and output_args)"
                )

    node.register_prehook(check)


def _backward_of(results: Iterable[Any]) -> Any:
    """AOTAutograd's node in the graph of the results; None if there is none near them."""
    nodes = [each.grad_fn for each in results if isinstance(each, torch.Tensor) and each.grad_fn is not None]
    for _ in range(3):
        for node in nodes:
            if "CompiledFunction" in node.name():
                return node
        nodes = [following for node in nodes for following, _ in node.next_functions if following is not None]
    return None


def _is_asked_for(parameter: nn.Parameter) -> bool:
    """Whether the backward that is running adds to the parameter's gradient."""
    if torch._C._current_graph_task_id() == -1:  # not PyTorch's engine: a compiled backward, which has no such question
        return True
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # the engine does not say of leaves in torch.autograd.grad
        return False


def _main_of(given: Any) -> Tensor | None:
    """The main gradient of an input that is a parameter and has one; this rank's part of a sharded one."""
    main = getattr(given, "main_grad", None) if isinstance(given, nn.Parameter) else None
    return _local(main) if isinstance(main, torch.Tensor) else None


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    whole: Any = tensor
    return whole.to_local() if hasattr(whole, "placements") else tensor


def _check(name: str, main: Tensor, parameter: Tensor) -> None:
    if main.dtype != torch.float32:
        words = f"must be float32, got {main.dtype}; give it one of {GIVEN}"
        raise TypeError(f"moecompile: the main_grad of {name} {words}")
    own = _local(parameter)  # an example, which has a DTensor's placements
    for what in ("shape", "device"):
        was, is_now = getattr(own, what), getattr(main, what)
        if was != is_now:
            words = f"must have its {what}, {was}, got {is_now}; give it one of {GIVEN}"
            raise ValueError(f"moecompile: the main_grad of {name} {words}")


def _layout(main: Tensor) -> Hashable:
    return tuple(main.shape), main.stride(), main.dtype, main.device


def _end(main: Tensor) -> int:
    """Behind its last element in memory."""
    last = sum(stride * (size - 1) for stride, size in zip(main.stride(), main.shape, strict=True))
    return main.data_ptr() + main.element_size() * (last + 1) * (main.numel() > 0)
