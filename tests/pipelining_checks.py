"""Pipelines of compiled stages on several ranks (tests/test_pipelining.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV
from torch.nn import functional as F

import moecompile
from expert_parallel_models import HIDDEN, Block
from moecompile import agreement, ordering, pipelining

FEATURES, TOKENS = 16, 6
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
        eager: bool = True, **options: Any,
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
        of_torch = [
            PipelineStage(stage, number, count, torch.device("cpu"), group=mesh.get_group("pp"))
            for stage, number in zip(self.stages, self.numbers, strict=True)
        ]
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

    def difference(self, of: Callable[[nn.Parameter], Any]) -> float:
        """Of something of all parameters."""
        found = 0.0
        for stage, number in zip(self.stages, self.numbers, strict=True):
            for (name, one), other in zip(stage.named_parameters(), self.right[number].parameters(), strict=True):
                mine, right = of(one), of(other)
                assert mine is not None and right is not None, name
                found = max(found, float((mine - right).abs().max() / right.abs().max()))
        return found


def check_experts(rank: int, ranks: int) -> None:
    job = Job(ranks // 2, 2, ranks, make=Experts, features=HIDDEN, eager=False)
    trains(job, bound=0.004)  # sums of gradients, in bfloat16, of micro-batches in another order
    print(job.pipeline, moecompile.last_report(), sep="\n")


def overlapped(job: Job) -> int:
    """How many pairs the schedule has on this rank."""
    actions = job.schedule.pipeline_order_with_comms[job.schedule.rank]
    return sum("OVERLAP" in str(each.computation_type) for each in actions)


def trains(job: Job, steps: int = 3, bound: float = 1e-5) -> None:
    """Steps with an optimizer: gradients and parameters as those of the model by itself."""
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (job.stages, job.right)]
    for number in range(steps):
        error = job.step(number)
        assert error < bound, f"step {number}: gradients differ by {error}"
        for each in optimizers:
            each.step()
    assert job.difference(lambda parameter: parameter.detach()) < bound
    assert job.pipeline.counts["pair"] == steps * overlapped(job) > 0, (job.pipeline.counts, job.pipeline.apart)
    assert not job.pipeline.apart and not job.pipeline.counts["whole"], job.pipeline


def check_pipeline(rank: int, ranks: int) -> None:
    job = Job(ranks, 1, 4 * ranks)
    trains(job)
    assert job.pipeline.counts["first part"] == job.pipeline.counts["second part"] > 0


def check_pipeline_of_experts(rank: int, ranks: int) -> None:
    job = Job(ranks // 2, 2, 2 * ranks)
    trains(job)
    print(job.pipeline)
    assert job.pipeline.counts["first part"] == job.pipeline.counts["second part"] > 0


def check_inductor(rank: int, ranks: int) -> None:
    job = Job(ranks // 2, 2, ranks, lowering="inductor")
    trains(job)
    print(job.pipeline)
