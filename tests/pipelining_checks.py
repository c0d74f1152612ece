"""Pipelines of compiled stages on several ranks (tests/test_pipelining.py)."""

from __future__ import annotations

import copy
import os
import tempfile
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import moecompile
from expert_parallel_models import HIDDEN, Block
from moecompile import agreement, ordering, pipelining, stage_actions
from overlap_checks import NO_ORDER, OLD
from pipelines_on_one_rank import connect_with_nobody

FEATURES, TOKENS = 16, 6
KINDS = {"forward", "backward", "first part", "second part", "pair"}
PER = 2
"""Sequences of a micro-batch."""


class Layer(nn.Module):
    """Attention within a sequence, and rows that travel to other ranks' matrices and back."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group = group
        self.norm = nn.LayerNorm(FEATURES)
        self.qkv, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.up, self.down = nn.Linear(FEATURES, 2 * FEATURES), nn.Linear(2 * FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        rows = self._exchanged(x.flatten(0, 1))
        rows = self._exchanged(self.down(F.silu(self.up(rows))))
        return x + rows.view_as(x)

    def _exchanged(self, rows: Tensor) -> Tensor:
        ranks = distributed.get_world_size(self.group)
        shares = [rows.shape[0] // ranks] * ranks
        return functional.all_to_all_single_autograd(rows, shares, shares, self.group)


class Stage(nn.Module):
    """Layers, different ones for each stage and, where they are experts, for each rank."""

    def __init__(self, number: int, group: Any, layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.layers = nn.Sequential(*(Layer(group) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


class Different(Stage):
    """Of each number another graph, that communicates alike."""

    def __init__(self, number: int, group: Any) -> None:
        super().__init__(number, group)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return torch.sin(found) if self.number else torch.cos(found)


class Recomputed(Stage):
    """Layers of which nothing is held but what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.layers, x, use_reentrant=False)
        return found


class Experts(nn.Module):
    """A mixture of experts that ranks share, behind a layer."""

    def __init__(self, number: int, group: Any) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.up = nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16)
        self.block = Block()
        mesh = DeviceMesh.from_group(group, "cpu")
        moecompile.shard_experts(self, mesh, gradients="sum")

    def forward(self, x: Tensor) -> Tensor:
        hidden = x + F.silu(self.up(x.bfloat16())).float()
        rows = self.block(hidden.flatten(0, 1).bfloat16())
        return hidden + rows.view_as(hidden).float()


def loss(found: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(found, target)


class Job:
    """A model on `pipeline` times `experts` ranks, and the same model by itself."""

    def __init__(
        self, pipeline: int, experts: int, microbatches: int, schedule: Any = ScheduleDualPipeV,
        make: Callable[..., nn.Module] = Stage, features: int = FEATURES,
        eager: bool = True, warm: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        agreement.forget()
        ordering.forget()  # groups of one check may have the names of another's
        mesh = init_device_mesh("cpu", (pipeline, experts), mesh_dim_names=("pp", "ep"))
        rank, peers, count = mesh.get_local_rank("pp"), mesh.get_group("ep"), 2 * pipeline
        self.first, self.microbatches, self.features = rank == 0, microbatches, features
        self.numbers = [rank, count - 1 - rank]
        self.right = nn.ModuleList(make(number, peers) for number in range(count))
        self.stages = nn.ModuleList(make(number, peers) for number in self.numbers)
        options = {"lowering": "eager", **options}
        for stage in [*self.stages, *([] if eager else self.right)]:
            stage.compile(backend="moecompile", fullgraph=True, options=options)
        if warm:
            for stage in self.stages:
                stage(torch.randn(PER, TOKENS, features, requires_grad=True)).sum().backward()
        of_torch = [
            PipelineStage(stage, number, count, torch.device("cpu"), group=mesh.get_group("pp"))
            for stage, number in zip(self.stages, self.numbers, strict=True)
        ]
        if pipeline == 1:
            connect_with_nobody(of_torch)
        self.schedule = schedule(of_torch, microbatches, loss_fn=loss)
        self.pipeline = pipelining.attach(self.schedule)
        self.rank_of_experts = mesh.get_local_rank("ep")

    def data(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * step + self.rank_of_experts)
        shape = self.microbatches * PER, TOKENS, self.features
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    def step(self, number: int) -> float:
        """Of both; how far gradients are apart at most, beside the largest."""
        x, target = self.data(number)
        self.stages.zero_grad()
        losses: list[Tensor] = []
        if self.first:
            self.schedule.step(x, target=target, losses=losses)
        else:
            self.schedule.step()
        self.right.zero_grad()
        for part, wanted in zip(x.chunk(self.microbatches), target.chunk(self.microbatches), strict=True):
            found = part
            for stage in self.right:
                found = stage(found)
            (loss(found, wanted) / self.microbatches).backward()
        return self.difference(lambda parameter: parameter.grad)

    def begin_alike(self) -> None:
        """With the parameters of the model by itself."""
        for stage, number in zip(self.stages, self.numbers, strict=True):
            stage.load_state_dict(self.right[number].state_dict())

    def difference(self, of: Callable[[nn.Parameter], Any]) -> float:
        """Of something of all parameters."""
        found = 0.0
        for stage, number in zip(self.stages, self.numbers, strict=True):
            for (name, one), other in zip(stage.named_parameters(), self.right[number].parameters(), strict=True):
                mine, right = of(one), of(other)
                assert mine is not None and right is not None, name
                found = max(found, float((mine - right).abs().max() / right.abs().max()))
        return found


def overlapped(job: Job) -> int:
    """How many pairs the schedule has on this rank."""
    actions = job.schedule.pipeline_order_with_comms[job.schedule.rank]
    return sum("OVERLAP" in str(each.computation_type) for each in actions)


def trains(job: Job, steps: int = 3, bound: float = 1e-5, routed: bool = False) -> None:
    """Steps with an optimizer: gradients and parameters as those of the model by itself.

    Where tokens are `routed`, no rounding of a step decides which experts they have in the next.
    """
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (job.stages, job.right)]
    for number in range(steps):
        error = job.step(number)
        assert error < bound, f"step {number}: gradients differ by {error}"
        for each in optimizers:
            each.step()
        if number < steps - 1 and routed:
            job.begin_alike()
    assert job.difference(lambda parameter: parameter.detach()) < bound


def runs_as_one(job: Job, steps: int = 3) -> None:
    """Every OVERLAP_F_B ran a pair, and every BACKWARD_INPUT was divided."""
    counts, words = job.pipeline.counts, str(job.pipeline)
    assert counts["pair"] == steps * overlapped(job) > 0 and not job.pipeline.apart, words
    assert counts["first part"] == counts["second part"] > 0 and not counts["whole"], words
    for graph in job.pipeline.graphs:  # five compilations at most
        assert set(graph.compiled) <= KINDS and set(graph.compiled.values()) == {1}, words


def check_pipeline(rank: int, ranks: int) -> None:
    job = Job(ranks, 1, 4 * ranks)
    trains(job)
    runs_as_one(job)
    if rank:  # stages that are alike share what was compiled
        assert len(job.pipeline.graphs) == 1


def check_pipeline_of_experts(rank: int, ranks: int) -> None:
    job = Job(ranks // 2, 2, 2 * ranks)
    trains(job)
    runs_as_one(job)
    notes = " ".join(note for graph in moecompile.last_report().graphs for note in graph.notes)
    assert "overlap: pair 1: ordered" in notes, notes


def check_inductor(rank: int, ranks: int) -> None:
    if OLD:
        raise unittest.SkipTest(NO_ORDER)
    job = Job(1, ranks, 4, lowering="inductor")
    trains(job)
    runs_as_one(job)


def check_experts(rank: int, ranks: int) -> None:
    job = Job(ranks // 2, 2, ranks, make=Experts, features=HIDDEN, eager=False)
    trains(job, bound=2**-6, routed=True)  # three sums of gradients in bfloat16, in another order: each rounds by 2**-8
    counts = job.pipeline.counts
    assert counts["pair"] == 3 * overlapped(job) and counts["first part"] == counts["second part"] > 0, job.pipeline
    for graph in job.pipeline.graphs:  # all parameters' gradients come later, those of experts too
        for divided in graph._divided.values():
            assert divided is not None and len(divided.parts.later) == 5, divided


def check_measured(rank: int, ranks: int) -> None:
    """What stages' nodes take is measured first, by graphs that run by themselves."""
    with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, {"MOECOMPILE_CACHE_DIR": directory}):
        job = Job(1, ranks, 4 * ranks, profile=True)
        trains(job)
    counts, words = job.pipeline.counts, str(job.pipeline)
    assert counts["measured"] > 0 < counts["pair"] and not job.pipeline.apart, words
    assert counts["measured"] + counts["pair"] == 3 * overlapped(job), words
    planned = {kind: plan for graph in moecompile.last_report().graphs for kind, plan in graph.planned.items()}
    assert planned["pair 1"].unmeasured and planned["pair 1"].tasks != planned["pair 1"].unmeasured


def check_zero_bubble(rank: int, ranks: int) -> None:
    job = Job(ranks, 1, 2 * ranks, schedule=ScheduleZBVZeroBubble)
    trains(job)
    counts = job.pipeline.counts
    assert counts["first part"] == counts["second part"] > 0 and not counts["whole"], job.pipeline


def check_recomputed(rank: int, ranks: int) -> None:
    job = Job(1, ranks, 4, make=Recomputed)
    trains(job)
    runs_as_one(job)


def check_one_rank_cannot(rank: int, ranks: int) -> None:
    found = pipelining.why_apart
    if rank == 1:
        vars(pipelining)["why_apart"] = lambda *_: "it has no room"
    try:
        job = Job(ranks // 2, 2, ranks)
        trains(job, steps=2)
    finally:
        vars(pipelining)["why_apart"] = found
    apart = 2 * overlapped(job)
    if rank < 2:  # of the ranks that share these experts none runs pairs
        assert job.pipeline.counts["apart"] == job.pipeline.apart["it has no room"] == apart, job.pipeline
        assert not job.pipeline.counts["pair"]
    else:
        assert job.pipeline.counts["pair"] == apart, job.pipeline


def check_some_cannot(rank: int, ranks: int) -> None:
    """Two stages' graphs communicate alike; one of the two pairs is none, on all ranks."""
    found, calls = pipelining.why_apart, list[int]()

    def second_cannot(*_: Any) -> str:
        calls.append(1)
        return "it has no room" if len(calls) == 2 else ""

    vars(pipelining)["why_apart"] = second_cannot
    try:
        job = Job(1, ranks, 4 * ranks, make=Different)
        trains(job, steps=2)
    finally:
        vars(pipelining)["why_apart"] = found
    counts = job.pipeline.counts
    assert counts["apart"] == job.pipeline.apart["it has no room"] > 0 < counts["pair"], job.pipeline
    assert counts["apart"] + counts["pair"] == 2 * overlapped(job), job.pipeline


def check_compiled_before(rank: int, ranks: int) -> None:
    job = Job(ranks, 1, 2 * ranks, warm=True)
    trains(job, steps=1)
    assert job.pipeline.counts["apart"] == job.pipeline.apart[stage_actions.NO_GRAPH] == overlapped(job), job.pipeline
    assert "compiled before" in str(job.pipeline)


def check_refusals(rank: int, ranks: int) -> None:
    stage = PipelineStage(nn.Linear(2, 2), rank, ranks, torch.device("cpu"))
    for wrong, error, words in (
        (Schedule1F1B(stage, 4, loss_fn=loss), TypeError, "got Schedule1F1B"),
        (stage, TypeError, "got PipelineStage"),
    ):
        refused(wrong, error, words)
    job = Job(ranks, 1, 2 * ranks)
    assert pipelining.attach(job.schedule) is job.pipeline
    for change, words in (({"dw_builder": lambda: None}, "has a `dw_builder`"), ({}, "functions for")):
        schedule = copy.copy(job.schedule)
        if change:
            schedule._comp_type_to_function_map = {}
        else:
            for each in schedule._stages:
                each.dw_builder = None
        refused(schedule, ValueError, words)
    schedule._comp_type_to_function_map = {}
    schedule._stages[0].submod = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    refused(schedule, ValueError, "DistributedDataParallel")


def refused(schedule: Any, error: type[Exception], words: str) -> None:
    try:
        pipelining.attach(schedule)
    except error as found:
        assert words in str(found), found
    else:
        raise AssertionError(words)
