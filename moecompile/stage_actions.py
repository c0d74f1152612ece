"""What the graphs of stages do while a schedule's action runs: one waits for another, or leaves a part for later."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

import torch

from moecompile import stage_graphs
from moecompile.stage_graphs import Later, Pair, StageGraph

NO_GRAPH = "no graph of moecompile's ran, or only one that was compiled before `attach`, or first for what is no stage"


class Pairs(Protocol):
    """Of a pipeline."""

    counts: Counter[str]
    apart: Counter[str]

    def pair_of(
        self, forward: StageGraph, of_forward: Sequence[Any], backward: StageGraph, of_backward: Sequence[Any]
    ) -> Pair | None:
        """Both graphs as one, for what they would be called with; None if they run one after the other."""
        ...


class Meeting:
    """A backward that stops at its graph until a forward has come to its own."""

    def __init__(self, pipeline: Pairs) -> None:
        self._pipeline = pipeline
        self._waits: tuple[StageGraph, list[Any]] | None = None  # what the backward has come to
        self._result: Sequence[Any] | None = None  # of the backward's graph, if it has run
        self._failed: BaseException | None = None
        self._over = False
        self._stopped, self._goes_on = threading.Event(), threading.Event()
        self._done: Future[Any] | None = None

    def begin(self, done: Future[Any]) -> None:
        """Waits until the backward has come to its graph, or to its end."""
        self._done = done
        done.add_done_callback(lambda _: self._stopped.set())
        self._stopped.wait()

    def end(self, failed: bool) -> None:
        """The forward is at its end, or has failed: a backward that still waits for its graph runs by itself."""
        if not self._over and failed:
            self._finish()
        if not self._over:
            self._pipeline.apart[NO_GRAPH] += 1
            self._pipeline.counts["apart"] += 1
            self._finish()

    def enters(self, kind: str, graph: StageGraph, args: list[Any]) -> Sequence[Any]:
        """Of either thread."""
        if self._over:
            return graph.run(kind, args)
        return self._backward_enters(graph, args) if kind == "backward" else self._forward_enters(graph, args)

    def _backward_enters(self, graph: StageGraph, args: list[Any]) -> Sequence[Any]:
        self._waits = graph, args
        self._stopped.set()
        self._goes_on.wait()
        if self._failed is not None:
            raise self._failed
        if self._result is None:
            return graph.run("backward", args)
        found, self._result = self._result, None
        return found

    def _forward_enters(self, graph: StageGraph, args: list[Any]) -> Sequence[Any]:
        if self._waits is None:
            return graph.run("forward", args)
        other, given = self._waits
        measures = graph.measures("forward") or other.measures("backward")
        pair = None if measures else self._pipeline.pair_of(graph, args, other, given)
        self._pipeline.counts["measured" if measures else "apart" if pair is None else "pair"] += 1
        if pair is None:
            self._finish()
            return graph.run("forward", args)
        try:
            self._result, found = pair.run(given, args)
        except BaseException as error:
            self._failed = error
            raise
        finally:
            self._finish()
        return found

    def _finish(self) -> None:
        """Lets the backward go on to its end."""
        self._over = True
        self._goes_on.set()
        if self._done is not None:
            wait([self._done])


class PuttingOff:
    """A backward whose gradients of parameters come later."""

    def __init__(self, pipeline: Pairs, stage: Any) -> None:
        self._pipeline, self._stage = pipeline, stage

    def end(self, failed: bool) -> None:
        """Of a backward that has failed nothing is left."""
        if failed:
            self._stage.dw_builder.left.clear()

    def enters(self, kind: str, graph: StageGraph, args: list[Any]) -> Sequence[Any]:
        """The stage comes to its backward graph."""
        if kind != "backward":
            return graph.run(kind, args)
        found = graph.first_part(args)
        self._pipeline.counts["whole" if found is None else "first part"] += 1
        if found is None:
            return graph.run(kind, args)
        gradients, later = found
        self._stage.dw_builder.left.append(later)
        return gradients


class Weights:
    """A stage's `dw_builder`: after a backward, what is left of it."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts, self.left = counts, list[Later]()

    def __call__(self) -> Any:
        """Asked for behind each backward; gives what a BACKWARD_WEIGHT of it calls."""
        left, self.left = self.left, []

        def run() -> None:
            for each in left:
                each()
                self._counts["second part"] += 1

        return run


@contextlib.contextmanager
def running(what: Meeting | PuttingOff) -> Iterator[None]:
    """All graphs of stages enter it meanwhile."""
    stage_graphs.running, failed = what, True
    try:
        yield
        failed = False
    finally:
        stage_graphs.running = None
        what.end(failed)


def as_here(function: Any) -> Any:
    """The function, on another thread, with what is this one's own: device and stream, autocast, context variables."""
    entered: list[Callable[[], Any]] = [
        functools.partial(torch.autocast, device, torch.get_autocast_dtype(device), True)
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        entered.append(functools.partial(torch.cuda.device, torch.cuda.current_device()))
        entered.append(functools.partial(torch.cuda.stream, torch.cuda.current_stream()))

    def run(*args: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for enter in entered:
                stack.enter_context(enter())
            return function(*args)

    return functools.partial(contextvars.copy_context().run, run)
