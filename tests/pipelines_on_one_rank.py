"""Pipelines whose stages are all on one rank: what a schedule runs, without what travels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import FORWARD, ScheduleDualPipeV
from torch.nn import functional as F

import moecompile
from expert_parallel_models import HIDDEN, Block

MICROBATCHES, TOKENS, FEATURES = 4, 24, 16


class Routed(nn.Module):
    """A layer, and experts."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.up, self.block = nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16), Block()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.block(F.silu(self.up(x)))
        return result


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """A group of this rank."""
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def loss(found: Tensor, target: Tensor) -> Tensor:
    """The mean square."""
    return F.mse_loss(found.float(), target.float())


def connect_with_nobody(stages: Sequence[Any]) -> None:
    """Torch 2.11 would connect a rank with itself, which gloo refuses."""
    for stage in stages:
        vars(stage)["_get_init_p2p_neighbors_ops"] = list


def pipeline_of(
    make: Any, modules: Sequence[nn.Module], microbatches: int, like: Tensor, *, group: Any = None,
    loss_fn: Callable[..., Tensor] = loss, **settings: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """A schedule of PyTorch's, and what moecompile makes of it.

    Args:
        make: the schedule's class.
        modules: compiled; one for each stage.
        microbatches: of a step.
        like: what all stages are given and give.
        group: of the ranks that have stages; by default all.
        loss_fn: of the last stage.
        settings: of the schedule.
    """
    count = len(modules)
    stages = [
        PipelineStage(each, number, count, like.device, group=group, input_args=like, output_args=like)
        for number, each in enumerate(modules)
    ]
    connect_with_nobody(stages)
    schedule = make(stages, microbatches, loss_fn=loss_fn, **settings)
    return schedule, moecompile.pipelining.attach(schedule)


def forwards_of(schedule: Any) -> list[tuple[int, int]]:
    """Stage and micro-batch of each forward, as they come on this rank."""
    found = list[tuple[int, int]]()
    for action in schedule.pipeline_order_with_comms[schedule.rank]:
        for each in action.sub_actions or (action,):
            if each.computation_type is FORWARD:
                found.append((each.stage_index, each.microbatch_index))
    return found


def step_by_itself(
    schedule: Any, modules: Sequence[nn.Module], x: Tensor, target: Tensor, microbatches: int,
    loss_fn: Callable[..., Tensor] = loss,
) -> None:  # fmt: skip
    """What a step of the schedule computes, without a pipeline: forwards in its order, and then all backwards."""
    found: list[Any] = [*x.chunk(microbatches)]
    for stage, number in forwards_of(schedule):
        found[number] = modules[stage](found[number])
    for one, wanted in zip(found, target.chunk(microbatches), strict=True):
        (loss_fn(one, wanted) / microbatches).backward()


def furthest(found: Sequence[nn.Module], right: Sequence[nn.Module]) -> tuple[float, str]:
    """How far gradients and buffers are apart at most, beside what they are, in the norm; and which."""
    worst = 0.0, "nothing"
    for one, other in zip(found, right, strict=True):
        pairs = zip(one.named_parameters(), other.parameters(), strict=True)
        compared = [(name, mine.grad, his.grad) for (name, mine), his in pairs]
        compared += [(name, mine, his) for (name, mine), his in zip(one.named_buffers(), other.buffers(), strict=True)]
        for name, mine, his in compared:
            assert mine is not None and his is not None, name
            error = float((mine.double() - his.double()).norm() / his.double().norm().clamp(min=1e-12))
            worst = max(worst, (float("inf") if math.isnan(error) else error, name))
    return worst


class Plain(nn.Module):
    """Two layers."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.one, self.other = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.other(F.silu(self.one(x)))
        return result


class Job:
    """A pipeline of two stages, and the same stages by themselves.

    Args:
        make: a stage of this number.
        schedule: its class.
        more: `options` of the backend, other arguments of `compile` (`compiled`), which `parts` of a stage are compiled
            if not all of it, and arguments of `pipeline_of`.
    """

    def __init__(
        self, make: Callable[[int], nn.Module] = Plain, schedule: Any = ScheduleDualPipeV, **more: Any
    ) -> None:
        torch._dynamo.reset()
        options = {"lowering": "eager", **more.pop("options", {})}
        compiled = {"fullgraph": True, **more.pop("compiled", {})}
        parts = more.pop("parts", lambda stage: [stage])
        self.loss = more.pop("loss_fn", loss)
        if more.get("scale_grads", True):
            more["loss_fn"] = self.loss
        else:
            more["loss_fn"] = lambda y, target: self.loss(y, target) / MICROBATCHES
        routed = make is Routed
        self.found: list[Any] = [make(number) for number in range(2)]
        self.right: list[Any] = [make(number) for number in range(2)]
        for part in (each for stage in (*self.found, *(self.right if routed else ())) for each in parts(stage)):
            part.compile(backend="moecompile", options=options, **compiled)
        self.dtype, self.features = (torch.bfloat16, HIDDEN) if routed else (torch.float32, FEATURES)
        like = torch.empty(TOKENS, self.features, dtype=self.dtype, requires_grad=True)
        self.schedule, self.pipeline = pipeline_of(schedule, self.found, MICROBATCHES, like, **more)

    def data(self, number: int = 0) -> tuple[Tensor, Tensor]:
        torch.manual_seed(100 + number)
        x, target = (torch.randn(MICROBATCHES * TOKENS, self.features).to(self.dtype) for _ in range(2))
        return x, target

    def step(self, number: int) -> tuple[float, str]:
        """Of both, with the same random numbers; how far they are apart."""
        x, target = self.data(number)
        torch.manual_seed(number)
        self.schedule.step(x, target=target)
        torch.manual_seed(number)
        step_by_itself(self.schedule, self.right, x, target, MICROBATCHES, self.loss)
        worst = furthest(self.found, self.right)
        for stage in (*self.found, *self.right):
            stage.zero_grad()
        return worst

    def trains(self, bound: float = 1e-5) -> None:
        for number in range(3):
            worst = self.step(number)
            assert worst[0] < bound, worst


def words_of(error: BaseException | None) -> str:
    """Of an error and of those that it came from."""
    return "" if error is None else f"{error}\n{words_of(error.__cause__ or error.__context__)}"


def pairs(job: Job) -> int:
    counts = job.pipeline.counts
    assert not job.pipeline.apart and not counts["apart"] and not counts["whole"], str(job.pipeline)
    return counts["pair"]
