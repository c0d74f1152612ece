"""A pipeline of two stages on one GPU: pairs by the kernels, and backwards in two parts, on autograd's own threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.nn import functional as F

import moecompile
from expert_parallel_models import HIDDEN, Block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MICROBATCHES, TOKENS, STEPS = 4, 256, 3


class Stage(nn.Module):
    """A layer, and experts."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.up, self.block = nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16), Block()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = x + F.silu(self.up(x))
        result: Tensor = hidden + self.block(hidden)
        return result


def loss(found: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(found.float(), target.float())


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("precision", ["model", "fp8"])
@pytest.mark.parametrize("aside", [False, True], ids=["default stream", "own stream"])
@pytest.mark.parametrize("make", [ScheduleDualPipeV, ScheduleZBVZeroBubble])
def test_gradients_are_those_without_a_pipeline(make: Any, aside: bool, precision: str) -> None:
    torch._dynamo.reset()
    found, right = ([Stage(number).cuda() for number in range(2)] for _ in range(2))
    for each in (*found, *right):
        each.compile(backend="moecompile", fullgraph=True, options={"lowering": "eager", "precision": precision})
    device = torch.device("cuda")
    like = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device, requires_grad=True)
    stages = [PipelineStage(each, n, 2, device, input_args=like, output_args=like) for n, each in enumerate(found)]
    for stage in stages:  # torch 2.11 would connect a rank with itself, which gloo refuses
        vars(stage)["_get_init_p2p_neighbors_ops"] = list
    schedule = make(stages, MICROBATCHES, loss_fn=loss)
    pipeline = moecompile.pipelining.attach(schedule)
    stream = torch.cuda.Stream() if aside else torch.cuda.current_stream()
    for step in range(STEPS):
        torch.manual_seed(100 + step)
        x, target = (torch.randn(MICROBATCHES * TOKENS, HIDDEN, device="cuda").bfloat16() for _ in range(2))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            schedule.step(x, target=target)
        torch.cuda.current_stream().wait_stream(stream)
        for part, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
            (loss(right[1](right[0](part)), wanted) / MICROBATCHES).backward()
        for one, other in zip(found, right, strict=True):
            for (name, mine), his in zip(one.named_parameters(), other.parameters(), strict=True):
                assert mine.grad is not None and his.grad is not None
                error = (mine.grad.float() - his.grad.float()).norm() / his.grad.float().norm()
                assert error < 0.01, f"step {step}: {name} is off by {float(error)}"
                mine.grad = his.grad = None
    assert pipeline.counts["first part"] == pipeline.counts["second part"] > 0, str(pipeline)
    assert (pipeline.counts["pair"] > 0) == (make is ScheduleDualPipeV) and not pipeline.apart, str(pipeline)
