"""What Python's stack tells of the call that is being compiled: whose it is, and which frames on it Dynamo gave up."""

from __future__ import annotations

import inspect
import sys
import traceback
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import nn

from moecompile.capture import Stop


@dataclass(frozen=True)
class Caller:
    """The call of the user's inside which a graph is compiled.

    Attributes:
        model: stands for the model: equal for all graphs of one model, whatever parts of it are compiled.
        nested: the module that is compiled was called by another one, which runs it as a part of itself.
    """

    model: Hashable
    nested: bool


def caller() -> Caller:
    """Whose graph is being compiled: the outermost module that is being called; without one, the compiled function."""
    modules: dict[int, nn.Module] = {}
    function: CodeType | None = None
    for frame in _stack(sys._getframe()):
        owner = _local(frame, "self")
        if isinstance(owner, nn.Module) and type(owner).__name__ != "OptimizedModule":
            modules[id(owner)] = owner
        if _is_entry(frame):
            function = getattr(_local(frame, "fn"), "__code__", function)
    # A weak reference, because what a report holds lives as long as the process.
    model = weakref.ref(list(modules.values())[-1]) if modules else function
    return Caller(model, nested=len(modules) > 1)


def given_up() -> list[Stop]:
    """The frames around the call being compiled that Dynamo gave up, outermost first; they run in Python.

    No graph tells of them: they are known from Dynamo's record of what it compiled, and from being on the stack.
    """
    from torch._dynamo.utils import get_compilation_metrics

    failed: dict[tuple[Any, ...], Any] = {
        (metrics.co_filename, metrics.co_name, metrics.co_firstlineno): metrics
        for metrics in get_compilation_metrics()
        if metrics.fail_reason and metrics.fail_user_frame_filename
    }
    if not failed:
        return []
    stops, found = [], []
    for frame in _stack(sys._getframe()):
        code = frame.f_code
        if metrics := failed.pop((code.co_filename, code.co_name, code.co_firstlineno), None):
            place = (metrics.fail_user_frame_filename, metrics.fail_user_frame_lineno, code.co_name)
            found.append(Stop(metrics.fail_reason, [traceback.FrameSummary(*place)]))
        if _is_entry(frame):  # what called it was never compiled, now at least
            stops = found[::-1]
    return stops


def _local(frame: FrameType, name: str) -> Any:
    """A local variable of a function's frame; None if there is none of that name.

    Before Python 3.13 a frame keeps what it was asked for, all of its variables, until it ends: a model that its caller
    deletes would live on. So it is let go of.
    """
    code = frame.f_code
    if name not in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
        return None
    local = frame.f_locals
    value = local.get(name)
    if sys.version_info < (3, 13) and code.co_flags & inspect.CO_NEWLOCALS and code.co_flags & inspect.CO_OPTIMIZED:
        local.clear()  # a snapshot, made anew whenever somebody asks
    return value


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_entry(frame: FrameType) -> bool:
    """Whether the frame is Dynamo's, around a call of what was compiled, which is its `fn`."""
    return frame.f_code.co_name == "compile_wrapper"
