"""A pipeline of two stages on one GPU: pairs by the kernels, and backwards in two parts, on autograd's own threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

from expert_parallel_models import HIDDEN
from pipelines_on_one_rank import Routed, alone, furthest, pipeline_of, step_by_itself

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MICROBATCHES, TOKENS, STEPS = 4, 256, 3


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    with alone(tmp_path):
        yield


@pytest.mark.parametrize("precision", ["model", "fp8"])
@pytest.mark.parametrize("aside", [False, True], ids=["default stream", "own stream"])
@pytest.mark.parametrize("make", [ScheduleDualPipeV, ScheduleZBVZeroBubble])
def test_gradients_are_those_without_a_pipeline(make: Any, aside: bool, precision: str) -> None:
    torch._dynamo.reset()
    found, right = ([Routed(number).cuda() for number in range(2)] for _ in range(2))
    for each in (*found, *right):
        each.compile(backend="moecompile", fullgraph=True, options={"lowering": "eager", "precision": precision})
    like = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    schedule, pipeline = pipeline_of(make, found, MICROBATCHES, like)
    stream = torch.cuda.Stream() if aside else torch.cuda.current_stream()
    for step in range(STEPS):
        torch.manual_seed(100 + step)
        x, target = (torch.randn(MICROBATCHES * TOKENS, HIDDEN, device="cuda").bfloat16() for _ in range(2))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            schedule.step(x, target=target)
        torch.cuda.current_stream().wait_stream(stream)
        step_by_itself(schedule, right, x, target, MICROBATCHES)
        error, name = furthest(found, right)
        assert error < 0.01, f"step {step}: {name} is off by {error}"
        for stage in (*found, *right):
            stage.zero_grad()
    assert pipeline.counts["first part"] == pipeline.counts["second part"] > 0, str(pipeline)
    assert (pipeline.counts["pair"] > 0) == (make is ScheduleDualPipeV) and not pipeline.apart, str(pipeline)
