"""Stages that write, draw random numbers, fail, or are more than one graph, in pipelines on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining.schedules import (
    ScheduleDualPipeV,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import moecompile
from moecompile import pipelining, stage_graphs
from pipelines_on_one_rank import (
    FEATURES,
    MICROBATCHES,
    TOKENS,
    Job,
    Plain,
    Routed,
    alone,
    furthest,
    loss,
    pairs,
    pipeline_of,
    step_by_itself,
    words_of,
)

SCHEDULES = (ScheduleDualPipeV, ScheduleZBVZeroBubble, ScheduleInterleavedZeroBubble)


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    with alone(tmp_path):
        yield


class Counting(Plain):
    """Writes what it has seen, and where it stood before, into buffers."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        assert isinstance(self.calls, Tensor) and isinstance(self.mean, Tensor)
        self.calls.add_(1)
        self.mean.mul_(0.9).add_(found.detach().mean(0), alpha=0.1)
        return found + self.calls


class Dropped(Plain):
    """Draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5))


class DroppedAgain(Dropped):
    """Draws the same random numbers in its backward."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return found


class Broken(Plain):
    """Two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        torch._dynamo.graph_break()
        return super().forward(found)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: Any) -> None:
    job = Job(schedule=schedule)
    job.trains()
    assert (pairs(job) > 0) == (schedule is ScheduleDualPipeV)
    assert job.pipeline.counts["first part"] == job.pipeline.counts["second part"] > 0


@pytest.mark.parametrize("make", [Counting, Dropped, DroppedAgain])
def test_what_writes_and_what_draws(make: Any) -> None:
    job = Job(make)
    job.trains()
    assert pairs(job) > 0


@pytest.mark.skipif(not moecompile.ordering.inductor_keeps_orders(), reason="Inductor keeps no order")
def test_buffers_with_inductor() -> None:
    """Also once more, where torch's caches have what was compiled: not AOTAutograd's, which keeps no graphs."""
    for _ in range(2):
        job = Job(Counting, options={"lowering": "inductor"})
        job.trains()
        assert pairs(job) > 0 and all(graph.record.cached == "miss" for graph in job.pipeline.graphs)


def test_a_buffer_of_two_stages() -> None:
    job = Job(Counting)
    for stages in (job.found, job.right):
        stages[1].calls = stages[0].calls
    job.trains()
    assert pairs(job) > 0  # AOTAutograd has what a forward writes into buffers written behind its graph


def test_sizes_that_are_symbols() -> None:
    job = Job(compiled={"dynamic": True})
    job.trains()
    (graph, *_) = job.pipeline.graphs
    assert stage_graphs.pairs.obstacle([graph.kept("forward")]) and pairs(job) > 0


def test_modules_of_two_pipelines() -> None:
    """Of other sizes, say: what is put off is of the pipeline that makes a step."""
    job = Job(compiled={"dynamic": True})
    job.step(0)
    like = torch.empty(2 * TOKENS, FEATURES, requires_grad=True)
    schedule, other = pipeline_of(ScheduleDualPipeV, job.found[::-1], MICROBATCHES, like)
    for first, second in ((job.pipeline, other), (other, job.pipeline)):
        x, target = (torch.randn(MICROBATCHES * (TOKENS if first is job.pipeline else 2 * TOKENS), FEATURES),) * 2
        before = first.counts.copy(), second.counts.copy()
        stages = job.right if first is job.pipeline else job.right[::-1]
        used = job.schedule if first is job.pipeline else schedule
        used.step(x, target=target)
        step_by_itself(used, stages, x, target, MICROBATCHES)
        assert furthest(job.found, job.right)[0] < 1e-5
        assert first.counts != before[0] and second.counts == before[1] and not first.apart
        for stage in (*job.found, *job.right):
            stage.zero_grad()


@pytest.mark.parametrize("shared", [False, True], ids=["of each stage", "of both stages"])
def test_loads_are_counted_and_main_gradients_added(shared: bool) -> None:
    """Where both stages add to the same memory, in the order that the schedule has."""
    job = Job(Routed, options={"expert_load": True, "main_grad": True}, scale_grads=False)
    for first, second in (job.found, job.right):
        for one, other in zip(first.block.experts.parameters(), second.block.experts.parameters(), strict=True):
            one.main_grad = torch.zeros_like(one, dtype=torch.float32)
            other.main_grad = one.main_grad if shared else torch.zeros_like(one.main_grad)
    for number in range(3):
        x, target = job.data(number)
        job.schedule.step(x, target=target)
        step_by_itself(job.schedule, job.right, x, target, MICROBATCHES)
    if shared:
        assert not job.pipeline.counts["pair"] and {*job.pipeline.apart} == {pipelining.EACH_OTHER}, str(job.pipeline)
    else:
        assert pairs(job) > 0
    for one, other in zip(job.found, job.right, strict=True):
        for (name, mine), his in zip(one.named_parameters(), other.parameters(), strict=True):
            found, right = (getattr(each, "main_grad", each.grad) for each in (mine, his))
            assert found is not None and right is not None and ("experts" in name) == hasattr(mine, "main_grad")
            assert (found.float() - right.float()).norm() < 0.01 * right.float().norm(), name
        (load,), (expected,) = (moecompile.expert_load(each).values() for each in (one, other))
        assert torch.equal(load, expected) and int(load.sum()) == 3 * MICROBATCHES * TOKENS * 2


def test_main_gradients_that_a_schedule_would_not_divide() -> None:
    job = Job(Routed, options={"main_grad": True})
    for stage in job.found:
        for each in stage.block.experts.parameters():
            each.main_grad = torch.zeros_like(each, dtype=torch.float32)
    x, target = job.data()
    with pytest.raises(RuntimeError) as caught:
        job.schedule.step(x, target=target)
    assert "Give it scale_grads=False" in words_of(caught.value)


def test_several_graphs() -> None:
    """Of each stage one is in a pair, and each backward is in two parts."""
    job = Job(Broken, compiled={"fullgraph": False})
    job.trains()
    counts = job.pipeline.counts
    assert pairs(job) > 0 and counts["first part"] == counts["second part"] > 0, str(job.pipeline)


def test_arguments_of_a_step() -> None:
    """What the loss is told, and outputs that nobody wants."""

    def scaled(found: Tensor, target: Tensor, *, scale: float) -> Tensor:
        return scale * loss(found, target)

    job = Job(loss_fn=scaled)
    x, target = job.data()
    losses: list[Tensor] = []
    result = job.schedule.step(x, target=target, losses=losses, loss_kwargs={"scale": 3.0}, return_outputs=False)
    step_by_itself(job.schedule, job.right, x, target, MICROBATCHES)
    for stage in job.right:
        for each in stage.parameters():
            each.grad.mul_(3)
    assert result is None and len(losses) == MICROBATCHES and pairs(job) > 0
    assert furthest(job.found, job.right)[0] < 1e-5
