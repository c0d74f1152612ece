"""Capturing a model with Dynamo alone: every graph, and every place where capturing stopped.

The model is run once, for real, because what happens behind a graph break depends on data; the graphs are run by
PyTorch itself. What the run and the capture would leave behind is put back: the state of the random generators,
buffers, and Dynamo's caches and memories.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from moecompile.bodies import copy_tree
from moecompile.passes.layout import Layout

MANY = 1 << 20


@dataclass(frozen=True)
class Stop:
    """A frame that Dynamo gave up.

    Attributes:
        reason: Dynamo's.
        frames: the user's, outermost first.
        raised: Dynamo raised instead of leaving the frame to Python, as it would under `torch.compile`.
    """

    reason: str
    frames: Sequence[traceback.FrameSummary]
    raised: bool = False


def capture(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    look: Callable[[fx.GraphModule], None],
    *,
    fullgraph: bool = False,
) -> list[Stop]:
    """Runs `model(*args, **kwargs)` once under Dynamo and shows every captured graph to `look`, which may change it.

    Args:
        model: a module or a function. Whatever of it is compiled already is captured anew, as one whole.
        args: what it is called with. Tensors are copied first, so that a call that writes into them does no harm.
        kwargs: the same.
        look: called with each graph as it is captured.
        fullgraph: raise at the first graph break instead of going on behind it.

    Returns:
        the frames that Dynamo gave up; where it raised, what comes behind was not run. A break that ends a graph is
        told by that graph (`gm.compile_subgraph_reason`).
    """
    from torch import _dynamo as dynamo

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        original = copy_tree(gm)
        look(gm)
        return original.forward

    listener: _Listener | None = None
    context: Any = dynamo.optimize(backend, nopython=fullgraph)
    if not fullgraph:
        converter = context.callback._torchdynamo_orig_backend
        converter._inner_convert = listener = _Listener(converter._inner_convert)
    module = getattr(model, "_orig_mod", model)
    args, kwargs = pytree.tree_map_only(Tensor, _own_copy, (args, kwargs))
    with _dynamo_left_alone(backend), _module_left_alone(module), torch.random.fork_rng(gpus_in_use()):
        try:
            context(module)(*args, **kwargs)
        except Exception as error:
            if listener is None or not listener.explains(error):
                raise
    return listener.stops if listener else []


class _Listener:
    """Dynamo's converter of one frame, with an ear for the exceptions by which it gives a frame up."""

    def __init__(self, convert: Any) -> None:
        self._convert = convert
        self._last: Exception | None = None
        self.stops: list[Stop] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._convert, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._convert(*args, **kwargs)
        except Exception as error:
            self._last = error
            if frames := getattr(error, "real_stack", None):
                self.stops.append(Stop(str(error), list(frames)))
            raise

    def explains(self, error: Exception) -> bool:
        """Whether what a run raised is Dynamo's inability to capture, which is then noted as the last stop.

        Not so where the model itself fails, on inputs of a wrong shape for example, or the look at a graph does.
        """
        from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError

        if error is not self._last or isinstance(error, BackendCompilerFailed | TorchRuntimeError):
            return False
        frames = getattr(error, "real_stack", None)
        if frames:
            self.stops.pop()
        self.stops.append(Stop(str(error), list(frames or ()), raised=True))
        return True


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def gpus_in_use() -> list[int]:
    """The GPUs whose random generators may have been used by this process."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextlib.contextmanager
def _module_left_alone(module: Any) -> Iterator[None]:
    """Within: parts compiled in place run uncompiled. After: that is undone, and buffers are as they were."""
    if not isinstance(module, nn.Module):
        yield
        return
    parts = list(module.modules())
    compiled = [(part, part._compiled_call_impl) for part in parts if part._compiled_call_impl is not None]
    buffers = [(part, dict(part._buffers)) for part in parts if part._buffers]
    values = [(buffer, buffer._version, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        for part, _ in compiled:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call
        for part, named in buffers:
            part._buffers.clear()
            part._buffers.update(named)
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)


@contextlib.contextmanager
def _dynamo_left_alone(backend: Callable[..., Any]) -> Iterator[None]:
    """Within: Dynamo tries every frame, even those it gave up before. After: it remembers nothing of `backend`.

    What is compiled by other backends stays compiled, and does not count among what a function may have. Sizes seen
    within do not count as seen, so that they make no later compilation dynamic, in this process or, through the file
    that Dynamo keeps of them, in the next.
    """
    from torch._dynamo import config, pgo

    sizes = pgo.get_code_state()
    remembered = copy.deepcopy(dict(sizes))
    sizes.clear()
    _forget_frames(backend)
    try:
        with config.patch(
            automatic_dynamic_local_pgo=False,
            automatic_dynamic_remote_pgo=False,
            recompile_limit=MANY,
            accumulated_recompile_limit=MANY,
        ):
            yield
    finally:
        _forget_frames(backend)
        sizes.clear()
        sizes.update(remembered)


def _forget_frames(backend: Callable[..., Any]) -> None:
    """Makes Dynamo forget the code that it gave up or compiled with `backend`, where it has compiled nothing else."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
    from torch._dynamo.convert_frame import input_codes

    for reference in list(input_codes.seen):
        code = reference()
        if code is not None and all(entry.backend is backend for entry in _debug_get_cache_entry_list(code)):
            reset_code(code)


def safe_inputs(graph: fx.Graph, inputs: Sequence[Any]) -> list[Any]:
    """The inputs to run a graph on: sizes as numbers, tensors without gradients, copies where the graph may write.

    Parameters that the graph does not write into are not copied; anything else is.
    """
    layout = Layout(graph)
    written = {
        alias for targets in layout.writers.values() for target in targets for alias in layout.aliases.of(target)
    }
    safe = []
    for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        if isinstance(value, Tensor):
            safe.append(
                value.detach() if isinstance(value, nn.Parameter) and node not in written else value.detach().clone()
            )
        else:
            safe.append(value.node.hint if isinstance(value, torch.SymInt) else value)
    return safe
