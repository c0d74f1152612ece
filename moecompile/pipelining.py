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
import inspect
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import fx, nn

from moecompile import ordering
from moecompile.options import Options
from moecompile.report import GraphReport
from moecompile.stage_actions import Meeting, PuttingOff, Weights, as_here, running
from moecompile.stage_graphs import Pair, StageGraph, why_apart, write_into_each_other

log = logging.getLogger("moecompile")
_pipelines: weakref.WeakKeyDictionary[Any, Pipeline] = weakref.WeakKeyDictionary()
_one_steps = threading.Lock()
_stepping: Pipeline | None = None
"""That makes a step now."""
NONE_OF_OURS = (
    "in a step no stage has run a graph of moecompile's that knows of the schedule: all ran as PyTorch has it. Call "
    'stage.submod.compile(backend="moecompile"), and `attach` before anything is compiled, or `torch._dynamo.reset()`'
)
EACH_OTHER = "one of them writes into memory that the other is given"


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
            "moecompile.pipelining.attach: expected ScheduleDualPipeV, ScheduleZBVZeroBubble, "
            "ScheduleInterleavedZeroBubble or another one of torch.distributed.pipelining that runs their actions, "
            f"got {type(schedule).__name__}"
        )
    if schedule not in _pipelines:
        _refuse(schedule)
        _pipelines[schedule] = Pipeline(schedule)
    return _pipelines[schedule]


def graph_for(inputs: Sequence[Any], record: GraphReport, chosen: Options) -> StageGraph | None:
    """For a captured graph with these inputs, if it is a stage's of a pipeline.

    Raises:
        ValueError: Inductor is to make CUDA graphs of it.
    """
    if _pipeline_of(inputs) is None:
        return None
    chosen.refuse_cuda_graphs("a stage of a pipeline does not go", "of which one micro-batch would overwrite another's")
    return StageGraph(record, chosen.lowering)


def refuse_scaling(inputs: Sequence[Any]) -> None:
    """Main gradients are added in a graph with these inputs: whoever divides gradients after a step misses them.

    Raises:
        ValueError: its stage's schedule does.
    """
    found = _pipeline_of(inputs)
    if found is not None and found.scales_gradients:
        raise ValueError(
            "moecompile: the schedule divides gradients by the number of micro-batches after a step, but no main_grad. "
            "Give it scale_grads=False, and a loss_fn that divides, or leave out the option main_grad"
        )


def noting(compiled: Any, graph: StageGraph | None) -> Any:
    """The compiled graph; if it is a stage's, pipelines tell of it."""
    if graph is None:
        return compiled

    def call(*given: Any) -> Any:
        if _stepping is not None:
            _stepping.graphs.add(graph)
        return compiled(*given)

    return call


def _pipeline_of(inputs: Sequence[Any]) -> Pipeline | None:
    """The one that makes a step, or the youngest, of those with a stage that one of these parameters belongs to."""
    known = [*_pipelines.values()][::-1] if _stepping is None else [_stepping]
    given = {id(each) for each in inputs if isinstance(each, nn.Parameter)}
    return next((each for each in known if not given.isdisjoint(each.parameters())), None)


class Pipeline:
    """What moecompile has run of a schedule.

    Attributes:
        counts: how often on this rank: "pair", "apart" (an OVERLAP_F_B whose graphs ran one after the other), "first
            part", "second part", "whole" (a BACKWARD_INPUT that could not be divided), and "measured" (an OVERLAP_F_B
            whose graphs are measured first, by themselves, with the option `profile`).
        apart: why graphs ran one after the other, with how often.
        graphs: of the stages.
    """

    def __init__(self, schedule: Any) -> None:
        from torch.distributed.pipelining.schedules import BACKWARD_INPUT, OVERLAP_F_B

        self._schedule = weakref.ref(schedule)
        self.counts: Counter[str] = Counter()
        self.apart: Counter[str] = Counter()
        self.graphs: set[StageGraph] = set()
        self._step: dict[str, Any] = {}
        self._told = False
        self._reasons: dict[tuple[fx.GraphModule, fx.GraphModule, bool], str] = {}
        self._pairs: dict[tuple[fx.GraphModule, fx.GraphModule], Pair] = {}
        self._thread = ThreadPoolExecutor(1, "moecompile backward")
        self._note_arguments(schedule)
        for stage in schedule._stages:
            stage.dw_builder = Weights(self.counts)
        schedule.register_custom_function(OVERLAP_F_B, self._overlap)
        schedule.register_custom_function(BACKWARD_INPUT, self._input_part)

    @property
    def scales_gradients(self) -> bool:
        """Whether the schedule divides `.grad` by the number of micro-batches."""
        return bool(getattr(self._schedule(), "scale_grads", False))

    def _note_arguments(self, schedule: Any) -> None:
        """Of a step, those that the schedule's actions know and custom functions are not told."""
        step, signature = schedule._step_microbatches, inspect.signature(schedule._step_microbatches)

        def noted(*args: Any, **kwargs: Any) -> Any:
            with self._steps(schedule):
                self._step = dict(signature.bind(*args, **kwargs).arguments)
                return step(*args, **kwargs)

        schedule._step_microbatches = noted

    @contextlib.contextmanager
    def _steps(self, schedule: Any) -> Iterator[None]:
        """Whatever is left of a step that fails is no other's."""
        global _stepping
        if not _one_steps.acquire(blocking=False):
            raise RuntimeError(
                "moecompile.pipelining: one step of a pipeline at a time: another thread of this process makes one. "
                "Let them take turns"
            )
        _stepping, failed = self, True
        try:
            yield
            failed = False
        finally:
            self._step, _stepping = {}, None
            for stage in schedule._stages:
                stage.dw_builder.left.clear()
                if failed:
                    stage.dw_runner.clear()
            _one_steps.release()
        if not self.graphs and not self._told:
            self._told = True
            log.warning("moecompile: %s: %s", type(schedule).__name__, NONE_OF_OURS)

    def parameters(self) -> set[int]:
        """Ids of those that stages have now."""
        schedule = self._schedule()
        stages = () if schedule is None else schedule._stages
        return {id(each) for stage in stages for each in stage.submod.parameters()}

    def _overlap(self, action: Any, context: Any) -> None:
        """OVERLAP_F_B."""
        from torch.distributed.pipelining.schedules import FORWARD

        schedule = context.schedule_ref
        stages = {stage.stage_index: stage for stage in schedule._stages}
        forward, backward = sorted(action.sub_actions, key=lambda each: each.computation_type is not FORWARD)
        _receive_forward(schedule, stages, forward)
        _receive_backward(schedule, stages, backward)
        meeting = Meeting(self)
        with running(meeting):
            done = self._thread.submit(as_here(_backward), schedule, stages, backward, True)
            meeting.begin(done)
            if done.done():
                done.result()  # an error, if it met one
            output = self._forward(schedule, stages, forward, context)
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
        with running(PuttingOff(self, stages[action.stage_index])):
            _backward(schedule, stages, action, False)
        if action.stage_index - 1 in stages:
            _hand_back(stages, action)

    def pair_of(
        self, forward: StageGraph, of_forward: Sequence[Any], backward: StageGraph, of_backward: Sequence[Any]
    ) -> Pair | None:
        """Both as one, if they can be, given this, and all ranks that they exchange something with have it.

        Ranks meet once for graphs that communicate so. Of other sizes a rank may have a pair by itself.

        Raises:
            DisagreementError: others run a pair that this rank cannot.
        """
        sized = backward.sized("backward", of_backward), forward.sized("forward", of_forward)
        key = *sized, write_into_each_other(forward, of_forward, backward, of_backward)
        if key not in self._reasons:
            own = EACH_OTHER if key[-1] else why_apart(forward, backward, sized)
            graphs = [each.graph for each in sized]
            reason = ordering.agreed_reason("pair", graphs, own)
            if own and not reason:  # of graphs that communicate as others do, which are pairs
                reason = ordering.agreed_reason("pair that is none", graphs, own)
            if reason:
                log.warning("moecompile: %s and a backward run one after the other: %s", forward.record.name, reason)
            self._reasons[key] = reason
        if reason := self._reasons[key]:
            self.apart[reason] += 1
            return None
        if sized not in self._pairs:
            self._pairs[sized] = Pair(forward, backward, sized)
        return self._pairs[sized]

    def __str__(self) -> str:
        schedule = self._schedule()
        numbers = [] if schedule is None else sorted(stage.stage_index for stage in schedule._stages)
        lines = [f"{type(schedule).__name__}: stages {numbers} on this rank"]
        lines += [f"  {kind:<12} {count}" for kind, count in self.counts.items()]
        lines += [f"  apart: {count} times: {reason}" for reason, count in self.apart.items()]
        compiled: Counter[str] = sum((graph.compiled for graph in self.graphs), Counter())
        kinds = ", ".join(f"{count} {kind}" for kind, count in compiled.items())
        lines.append(f"  compiled {compiled.total()} graphs of {len(self.graphs)} captured: {kinds or 'none'}")
        return "\n".join(lines)

    __repr__ = __str__


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
