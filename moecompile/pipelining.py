"""Pipelines of PyTorch's whose stages are compiled: `moecompile.pipelining.attach(schedule)`.

    for stage in stages:
        stage.submod.compile(backend="moecompile", fullgraph=True)
    schedule = ScheduleDualPipeV(stages, n_microbatches=16, loss_fn=loss)
    pipeline = moecompile.pipelining.attach(schedule)
    schedule.step(x, target=y)
    print(pipeline)

The engine is PyTorch's. Of a schedule's actions moecompile runs three in another way:

    OVERLAP_F_B      forward and backward graph as one, in an order in which either's communication hides behind the
                     other's computation
    BACKWARD_INPUT   the part of the backward graph that gives the gradients of what came in
    BACKWARD_WEIGHT  the rest of it

What a stage does around its graphs stays PyTorch's too (autograd, hooks, loss, what is sent and received): a backward
runs on a thread of its own up to its graph and stops there; the forward runs up to its own; both run as one; then the
backward goes on to its end, and the forward after it. Only one of the two threads runs at any time.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import nn

from moecompile import ordering, stage_graphs
from moecompile.report import GraphReport
from moecompile.stage_graphs import Later, Pair, StageGraph, why_apart

log = logging.getLogger("moecompile")
_pipelines: weakref.WeakKeyDictionary[Any, Pipeline] = weakref.WeakKeyDictionary()
NO_GRAPH = "no graph of moecompile's ran, or only one that was compiled before `attach`"


def attach(schedule: Any) -> Pipeline:
    """Has a schedule's stages run what moecompile makes of their graphs. Call it before the first step.

    Args:
        schedule: ScheduleDualPipeV, ScheduleZBVZeroBubble, ScheduleInterleavedZeroBubble or another one of
            `torch.distributed.pipelining` that runs their actions. Its stages are compiled in place:
            `stage.submod.compile(backend="moecompile", fullgraph=True)`.

    Returns:
        the pipeline, which tells what was run. The same for a schedule that has one.

    Raises:
        TypeError: it is no such schedule.
        ValueError: a stage is under FSDP or DDP, or has a `dw_builder`; the schedule has functions of others'.
    """
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    if not isinstance(schedule, _PipelineScheduleRuntime):
        raise TypeError(
            "moecompile.pipelining.attach: expected a schedule of torch.distributed.pipelining that runs actions, such "
            f"as ScheduleDualPipeV, got {type(schedule).__name__}"
        )
    if schedule not in _pipelines:
        _refuse(schedule)
        _pipelines[schedule] = Pipeline(schedule)
    return _pipelines[schedule]


def graph_for(inputs: Sequence[Any], record: GraphReport, lowering: str) -> StageGraph | None:
    """For a captured graph with these inputs, if it is a stage's of a pipeline."""
    return StageGraph(record, lowering) if _stage_of(inputs) is not None else None


def noting(compiled: Any, graph: StageGraph | None, inputs: int) -> Any:
    """The compiled graph, which notes the parameters of the stages that call it.

    Args:
        compiled: takes the captured graph's inputs.
        graph: None if it is no stage's.
        inputs: how many the graph has with those that were lifted.
    """
    if graph is None:
        return compiled

    def call(*given: Any) -> Any:
        found = _stage_of(given)
        if found is not None:
            parameters = [each if isinstance(each, nn.Parameter) and each.requires_grad else None for each in given]
            graph.parameters[found[1]] = [*parameters, *[None] * (inputs - len(given))]
            found[0].graphs.add(graph)
        return compiled(*given)

    return call


def _stage_of(inputs: Sequence[Any]) -> tuple[Pipeline, int] | None:
    """The pipeline's stage that the first parameter belongs to which is one of a stage."""
    for each in inputs:
        if isinstance(each, nn.Parameter):
            for pipeline in _pipelines.values():
                if (stage := pipeline.owner.get(id(each))) is not None:
                    return pipeline, stage
    return None


class Pipeline:
    """What moecompile has run of a schedule.

    Attributes:
        counts: how often on this rank: "pair", "apart" (an OVERLAP_F_B whose graphs ran one after the other), "first
            part", "second part" and "whole" (a BACKWARD_INPUT that could not be divided).
        apart: why graphs ran one after the other, with how often.
        graphs: of the stages.
    """

    def __init__(self, schedule: Any) -> None:
        from torch.distributed.pipelining.schedules import BACKWARD_INPUT, OVERLAP_F_B

        self._schedule = weakref.ref(schedule)
        self.counts: Counter[str] = Counter()
        self.apart: Counter[str] = Counter()
        self.graphs: set[StageGraph] = set()
        self.owner = {id(each): stage.stage_index for stage in schedule._stages for each in stage.submod.parameters()}
        self._step: dict[str, Any] = {}
        self._pairs: dict[tuple[StageGraph, StageGraph], Pair | str] = {}
        self._thread = ThreadPoolExecutor(1, "moecompile backward")
        self._note_arguments(schedule)
        for stage in schedule._stages:
            stage.dw_builder = _Weights(self.counts)
        schedule.register_custom_function(OVERLAP_F_B, self._overlap)
        schedule.register_custom_function(BACKWARD_INPUT, self._input_part)

    def _note_arguments(self, schedule: Any) -> None:
        """Of a step, those that the schedule's actions know and custom functions are not told."""
        step, signature = schedule._step_microbatches, inspect.signature(schedule._step_microbatches)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self._step = dict(signature.bind(*args, **kwargs).arguments)
            return step(*args, **kwargs)

        schedule._step_microbatches = noted

    def _overlap(self, action: Any, context: Any) -> None:
        """OVERLAP_F_B."""
        schedule = context.schedule_ref
        stages = {stage.stage_index: stage for stage in schedule._stages}
        forward, backward = action.sub_actions
        _receive_forward(schedule, stages, forward)
        _receive_backward(schedule, stages, backward)
        meeting = _Meeting(self)
        with _running(meeting):
            done = self._thread.submit(
                contextvars.copy_context().run, _on_stream(_backward), schedule, stages, backward, True
            )
            meeting.begin(done)
            try:
                output = self._forward(schedule, stages, forward, context)
            finally:
                meeting.end()
            done.result()
        _hand_on(stages, forward, output, backward)

    def _forward(self, schedule: Any, stages: dict[int, Any], action: Any, context: Any) -> Any:
        stage, number = stages[action.stage_index], action.microbatch_index
        keep = {"save_forward_output": self._step["return_outputs"]} if "return_outputs" in self._step else {}
        output = stage.forward_one_chunk(number, context.arg_mbs[number], context.kwarg_mbs[number], **keep)
        told = [self._step["loss_kwargs"]] if self._step.get("loss_kwargs") else []
        schedule._maybe_compute_loss(stage, output, context.target_mbs, number, *told)
        return output

    def _input_part(self, action: Any, context: Any) -> None:
        """BACKWARD_INPUT."""
        schedule = context.schedule_ref
        stages = {stage.stage_index: stage for stage in schedule._stages}
        _receive_backward(schedule, stages, action)
        with _running(_PuttingOff(self, stages[action.stage_index])):
            _backward(schedule, stages, action, False)
        if action.stage_index - 1 in stages:
            _hand_back(stages, action)

    def pair_of(self, forward: StageGraph, backward: StageGraph) -> Pair | None:
        """Both as one, if all ranks that they exchange something with have it."""
        key = forward, backward
        if key not in self._pairs:
            reason = why_apart(forward, backward)
            kept = [forward.kept("forward").graph, backward.kept("backward").graph]
            reason = ordering.first_reason("pair", kept, reason)
            self._pairs[key] = reason or Pair(forward, backward)
            if reason:
                log.warning("moecompile: %s and a backward run one after the other: %s", forward.record.name, reason)
        found = self._pairs[key]
        if isinstance(found, str):
            self.apart[found] += 1
            return None
        return found

    def __str__(self) -> str:
        schedule = self._schedule()
        lines = [f"{type(schedule).__name__}: stages {sorted({*self.owner.values()})} on this rank"]
        lines += [f"  {kind:<12} {count}" for kind, count in self.counts.items()]
        lines += [f"  apart: {count} times: {reason}" for reason, count in self.apart.items()]
        compiled: Counter[str] = sum((graph.compiled for graph in self.graphs), Counter())
        kinds = ", ".join(f"{count} {kind}" for kind, count in compiled.items())
        lines.append(f"  compiled {compiled.total()} graphs of {len(self.graphs)} captured: {kinds}")
        return "\n".join(lines)


class _Meeting:
    """A backward that stops at its graph until a forward has come to its own."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._waits: tuple[StageGraph, list[Any]] | None = None  # what the backward has come to
        self._result: Sequence[Any] | None = None  # of the backward's graph, if it has run
        self._over = False
        self._stopped, self._goes_on = threading.Event(), threading.Event()
        self._done: Future[Any] = Future()

    def begin(self, done: Future[Any]) -> None:
        """Waits until the backward has come to its graph, or to its end."""
        self._done = done
        done.add_done_callback(lambda _: self._stopped.set())
        self._stopped.wait()

    def end(self) -> None:
        """The forward is at its end: a backward that still waits for its graph runs by itself."""
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
        if self._result is None:
            return graph.run("backward", args)
        found, self._result = self._result, None
        return found

    def _forward_enters(self, graph: StageGraph, args: list[Any]) -> Sequence[Any]:
        if self._waits is None:
            return graph.run("forward", args)
        other, given = self._waits
        pair = self._pipeline.pair_of(graph, other)
        self._pipeline.counts["apart" if pair is None else "pair"] += 1
        if pair is None:
            self._finish()
            return graph.run("forward", args)
        self._result, found = pair.run(given, args)
        self._finish()
        return found

    def _finish(self) -> None:
        """Lets the backward go on to its end."""
        self._over = True
        self._goes_on.set()
        wait([self._done])


class _PuttingOff:
    """A backward whose gradients of parameters come later."""

    def __init__(self, pipeline: Pipeline, stage: Any) -> None:
        self._pipeline, self._stage = pipeline, stage

    def enters(self, kind: str, graph: StageGraph, args: list[Any]) -> Sequence[Any]:
        """The stage comes to its backward graph."""
        if kind != "backward":
            return graph.run(kind, args)
        found = graph.first_part(self._stage.stage_index, args)
        self._pipeline.counts["whole" if found is None else "first part"] += 1
        if found is None:
            return graph.run(kind, args)
        gradients, later = found
        self._stage.dw_builder.left.append(later)
        return gradients


class _Weights:
    """A stage's `dw_builder`: after a backward, what is left of it."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts, self.left = counts, list[Later]()

    def __call__(self) -> Any:
        left, self.left = self.left, []

        def run() -> None:
            for each in left:
                each()
                self._counts["second part"] += 1

        return run


def _refuse(schedule: Any) -> None:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.pipelining.schedules import BACKWARD_INPUT, OVERLAP_F_B

    for stage in schedule._stages:
        words = f"moecompile.pipelining.attach: stage {stage.stage_index}"
        sharded = (FSDPModule, FullyShardedDataParallel, nn.parallel.DistributedDataParallel)
        for module in stage.submod.modules():
            if isinstance(module, sharded):
                raise ValueError(
                    f"{words}: {type(module).__name__}: parameters under FSDP or DDP are not supported. Reduce "
                    "gradients after the step instead, over the ranks that have the same stage."
                )
        if stage.dw_builder is not None:
            raise ValueError(f"{words} has a `dw_builder`, which would be replaced: leave it out.")
    taken = {BACKWARD_INPUT, OVERLAP_F_B} & {*schedule._comp_type_to_function_map}
    if taken:
        raise ValueError(
            f"moecompile.pipelining.attach: the schedule has functions for {', '.join(map(str, taken))} already, which "
            "would be replaced: register none."
        )


@contextlib.contextmanager
def _running(what: Any) -> Iterator[None]:
    stage_graphs.running = what
    try:
        yield
    finally:
        stage_graphs.running = None


def _on_stream(function: Any) -> Any:
    """The function, on another thread, on this one's device and stream."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return function
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()

    def run(*args: Any) -> Any:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            return function(*args)

    return run


def _receive_forward(schedule: Any, stages: dict[int, Any], action: Any) -> None:
    from torch.distributed.pipelining.schedules import _wait_batch_p2p

    number, index = action.microbatch_index, action.stage_index
    schedule._assert_unsharded(stages[index])
    if not stages[index].is_first and index - 1 not in stages:
        _wait_batch_p2p(schedule.fwd_recv_ops.pop((index, number)))


def _receive_backward(schedule: Any, stages: dict[int, Any], action: Any) -> None:
    from torch.distributed.pipelining.schedules import _wait_batch_p2p

    number, index = action.microbatch_index, action.stage_index
    schedule._assert_unsharded(stages[index])
    if not stages[index].is_last and index + 1 not in stages:
        _wait_batch_p2p(schedule.bwd_recv_ops.pop((index, number)))


def _backward(schedule: Any, stages: dict[int, Any], action: Any, full: bool) -> None:
    stage, number = stages[action.stage_index], action.microbatch_index
    loss = schedule._maybe_get_loss(stage, number)
    if full:
        schedule.backward_counter[action.stage_index] += 1
    last = full and schedule.backward_counter[action.stage_index] == schedule._n_microbatches
    stage.backward_one_chunk(number, loss=loss, full_backward=full, last_backward=last)


def _hand_on(stages: dict[int, Any], forward: Any, output: Any, backward: Any) -> None:
    """To stages on the same rank, which nothing is sent to."""
    if forward.stage_index + 1 in stages:
        stages[forward.stage_index + 1].set_local_fwd_input(output, forward.microbatch_index)
    if backward.stage_index - 1 in stages:
        _hand_back(stages, backward)


def _hand_back(stages: dict[int, Any], backward: Any) -> None:
    number, index = backward.microbatch_index, backward.stage_index
    stages[index - 1].set_local_bwd_input(stages[index].get_local_bwd_output(number), number)
