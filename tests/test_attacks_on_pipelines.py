"""Stages with which gradients went wrong, or might: whose they are, when they come, and what is left of errors."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

from moecompile import stage_graphs
from pipelines_on_one_rank import (
    FEATURES,
    MICROBATCHES,
    TOKENS,
    Job,
    Plain,
    alone,
    furthest,
    loss,
    pipeline_of,
    step_by_itself,
    words_of,
)

SCHEDULES = (ScheduleDualPipeV, ScheduleZBVZeroBubble)
both = pytest.mark.parametrize("schedule", SCHEDULES)


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    with alone(tmp_path):
        yield


class Layers(nn.Module):
    """Layers that share a graph."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Plain(10 * number + layer) for layer in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@both
def test_a_graph_that_several_layers_share(schedule: Any) -> None:
    Job(Layers, schedule, parts=lambda stage: stage.layers).trains()


@both
def test_parameters_that_were_replaced(schedule: Any) -> None:
    job = Job(schedule=schedule)
    job.step(0)
    for one, other in zip(job.found, job.right, strict=True):
        state = {name: torch.randn_like(each) / 4 for name, each in one.state_dict().items()}
        one.load_state_dict({name: nn.Parameter(each.clone()) for name, each in state.items()}, assign=True)
        other.load_state_dict(state)
    job.trains()


@both
def test_weights_of_two_stages(schedule: Any) -> None:
    job = Job(schedule=schedule, scale_grads=False)  # which PyTorch would do twice
    for stages in (job.found, job.right):
        stages[1].one.weight = stages[0].one.weight
    job.trains()


def test_a_module_of_the_stages_class_in_the_loss() -> None:
    """Its graph is theirs, its parameters are its own."""
    torch._dynamo.reset()
    heads = [Plain(7) for _ in range(2)]
    heads[0].compile(backend="moecompile", fullgraph=True, options={"lowering": "eager"})
    used = heads[0]
    job = Job(schedule=ScheduleZBVZeroBubble, loss_fn=lambda y, target: loss(y, target) + loss(used(y), target))
    heads[0].compile(backend="moecompile", fullgraph=True, options={"lowering": "eager"})
    x, target = job.data()
    job.schedule.step(x, target=target)
    used = heads[1]
    step_by_itself(job.schedule, job.right, x, target, MICROBATCHES, job.loss)
    for each in heads[0].parameters():
        each.grad = None if each.grad is None else each.grad / MICROBATCHES  # no stage's: the schedule divides it not
    assert furthest([*job.found, heads[0]], [*job.right, heads[1]])[0] < 1e-5


class Scaled(torch.autograd.Function):
    """A product whose backward reads a buffer, and writes into it then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_weight = (gradients[0].t() @ x) * ctx.scale
        ctx.scale.mul_(0.5)
        return gradients[0] @ weight, of_weight, None


class Scaling(Plain):
    """Scales of gradients that are adapted in the backward."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Scaled.apply(super().forward(x), self.other.weight, self.scale)
        return found


@both
def test_a_buffer_that_the_backward_writes(schedule: Any) -> None:
    """What reads it before comes before, in the first part."""
    job = Job(Scaling, schedule)
    for stage in job.right:
        stage.compile(backend="aot_eager")  # which functionalizes the write, as ours does
    job.trains()


class Passing(Plain):
    """Parameters whose gradient is what the backward is given."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.p, self.q = (nn.Parameter(torch.randn(TOKENS, FEATURES)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.p + self.q


@both
def test_gradients_that_are_given(schedule: Any) -> None:
    Job(Passing, schedule).trains()


class Counted(Plain):
    """Sizes that are known only when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        rows = (found[:, 0] > 0).nonzero().squeeze(1)
        return found.index_add(0, rows, found[rows] * 2) * (found[:, :8].argmax(-1).unique().shape[0] / 8)


@both
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_sizes_that_are_known_when_it_runs(schedule: Any) -> None:
    job = Job(Counted, schedule)
    job.trains()
    assert not job.pipeline.counts["pair"] and all("known only when" in reason for reason in job.pipeline.apart)


class Hooked(nn.Module):
    """A parameter of the graph that is used beside it, too."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.inner = Plain(number)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x) * self.inner.one.bias
        return found


@both
@pytest.mark.parametrize("make", [Hooked, Plain])
def test_hooks_of_parameters(make: Any, schedule: Any) -> None:
    """Each once for a backward, with all of its gradient: such gradients do not come later."""
    job = Job(make, schedule, parts=lambda stage: [getattr(stage, "inner", stage)], scale_grads=False)
    calls: list[str] = []
    for stages in (job.found, job.right):
        for stage in stages:
            for name, parameter in stage.named_parameters():
                parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    job.trains()
    assert len(calls) == 2 * 3 * 2 * 4 * MICROBATCHES and not job.pipeline.counts["first part"]


@pytest.mark.parametrize("where", ["forward", "backward", "pair"])
def test_errors_come_to_the_caller(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either half: nothing waits for the other, and nothing of it is left."""
    job = Job()
    job.step(0)
    calls = 0

    def fails(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == MICROBATCHES:
            raise ArithmeticError("on purpose")

    if where == "forward":
        vars(job.schedule._stages[1])["submod"] = Failing(fails)
    elif where == "backward":
        next(job.found[0].parameters()).register_hook(fails)
    else:
        monkeypatch.setattr(stage_graphs.Pair, "run", lambda *_: [*map(fails, range(MICROBATCHES))])
    x, target = job.data()
    with pytest.raises((ArithmeticError, RuntimeError)) as caught:
        job.schedule.step(x, target=target)
    assert "on purpose" in words_of(caught.value)
    assert stage_graphs.running is None
    assert job.pipeline._thread.submit(lambda: "free").result(timeout=10) == "free"
    assert where == "forward" or not job.pipeline.apart
    monkeypatch.undo()
    vars(job.schedule._stages[1])["submod"] = job.found[1]
    goes_on(job)


class Failing(nn.Module):
    """A stage that fails once."""

    def __init__(self, fails: Callable[..., None]) -> None:
        super().__init__()
        self.fails, self.inner = fails, Plain(0)

    def forward(self, x: Tensor) -> Tensor:
        self.fails()
        result: Tensor = self.inner(x)
        return result


class Front(nn.Module):
    """Work in front of a graph."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.inner = Plain(number)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x.clone() if x.requires_grad else x.clone().requires_grad_())
        return found


def test_what_is_left_when_a_backward_fails() -> None:
    """In front of a graph whose first part has run: no later step adds the rest."""

    def fails(_: Any) -> None:
        raise ArithmeticError("on purpose")

    job = Job(Front, ScheduleZBVZeroBubble, parts=lambda stage: [stage.inner])
    job.step(0)
    x, target = job.data()
    hooks = [
        stage.inner.register_forward_pre_hook(lambda _, given: given[0].register_hook(fails) and None)
        for stage in job.found
    ]
    with pytest.raises((ArithmeticError, RuntimeError)) as caught:
        job.schedule.step(x, target=target)
    assert "on purpose" in words_of(caught.value)
    for hook in hooks:
        hook.remove()
    goes_on(job)


def goes_on(job: Job) -> None:
    """After a step that failed."""
    for stage in (*job.found, *job.right):
        stage.zero_grad()
    job.schedule._internal_losses.clear()  # PyTorch's own
    job.trains()


def test_what_is_left_of_a_backward_is_not_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(schedule=ScheduleZBVZeroBubble)
    job.step(0)
    second = stage_graphs.Later.__call__

    def written(later: stage_graphs.Later) -> None:
        with torch.no_grad():
            later.given[-1].mul_(2)
        second(later)

    monkeypatch.setattr(stage_graphs.Later, "__call__", written)
    x, target = job.data()
    with pytest.raises(RuntimeError, match="Update parameters and buffers between steps"):
        job.schedule.step(x, target=target)


def test_one_step_at_a_time() -> None:
    """Of two threads' the second is refused, and the first goes on."""
    job, found = Job(), list[BaseException]()
    x, target = job.data()
    inside, done = threading.Event(), threading.Event()

    def waits(y: Tensor, wanted: Tensor) -> Tensor:
        inside.set()
        done.wait()
        return loss(y, wanted)

    job.schedule._loss_fn = waits
    thread = threading.Thread(target=lambda: job.schedule.step(x, target=target))
    thread.start()
    inside.wait()
    like = torch.empty(TOKENS, FEATURES, requires_grad=True)
    other, _ = pipeline_of(ScheduleDualPipeV, [Plain(3), Plain(4)], MICROBATCHES, like)
    try:
        with pytest.raises(RuntimeError, match="one step of a pipeline at a time"):
            other.step(x, target=target)
    finally:
        done.set()
        thread.join()
    step_by_itself(job.schedule, job.right, x, target, MICROBATCHES)
    assert furthest(job.found, job.right)[0] < 1e-5 and not found


class InPrecision(torch.autograd.Function):
    """A product whose backward multiplies in autocast's precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return (gradients[0] @ weight.t()).float(), None


@both
def test_autocast_around_a_step(schedule: Any) -> None:
    """Holds in backwards on a thread of their own, too."""
    weight = torch.randn(FEATURES, FEATURES)
    job = Job(schedule=schedule, loss_fn=lambda y, target: loss(InPrecision.apply(y, weight), target))
    for stage in job.right:
        stage.compile(backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        job.trains()


def test_nothing_is_kept_of_a_pipeline() -> None:
    job = Job()
    job.step(0)
    alive = [weakref.ref(each) for each in (job.schedule, job.pipeline, *job.found, *job.found[0].parameters())]
    del job
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)


def test_stages_that_nobody_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """A word after the first step, with the cure."""
    job = Job(schedule=ScheduleZBVZeroBubble, parts=lambda _: [])
    job.trains()
    said = [each.getMessage() for each in caplog.records if "no stage has run a graph" in each.getMessage()]
    assert len(said) == 1 and 'stage.submod.compile(backend="moecompile")' in said[0]
    assert "compiled 0 graphs of 0 captured: none" in repr(job.pipeline)


def test_cuda_graphs_are_refused() -> None:
    job = Job(options={"lowering": "inductor", "inductor": {"triton.cudagraphs": True}})
    x, target = job.data()
    with pytest.raises((RuntimeError, ValueError)) as caught:
        job.schedule.step(x, target=target)
    assert "a stage of a pipeline does not go with Inductor's CUDA graphs" in words_of(caught.value)


def test_fully_sharded_stages_are_refused() -> None:
    modules = [Plain(0), Plain(1)]
    fully_shard(modules[0], mesh=init_device_mesh("cpu", (1,)))
    like = torch.empty(TOKENS, FEATURES)
    with pytest.raises(ValueError, match="stage 0: FSDPPlain: parameters under FSDP or DDP are not supported"):
        pipeline_of(ScheduleDualPipeV, modules, MICROBATCHES, like)
