"""What pipelines cost on one GPU: `PYTHONPATH=tests python tests/pipeline_on_one_gpu.py`.

Two stages on one rank, of DeepSeek-V3-like layers, nothing that travels: the same products in every row, but for those
that a backward in two parts has twice. All take turns in one process.

    by themselves           compiled stages, forward and backward of one micro-batch after the other
    DualPipeV, pairs        OVERLAP_F_B as one graph
    DualPipeV, apart        the same actions, a backward and then a forward
    ZBV                     all backwards in two parts
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.nn import functional as F

from expert_parallel_models import Block
from moecompile import pipelining
from pipelines_on_one_rank import alone, pipeline_of

ALONE = "by themselves"
SCHEDULES = {
    "DualPipeV, pairs": ScheduleDualPipeV,
    "DualPipeV, apart": ScheduleDualPipeV,
    "ZBV": ScheduleZBVZeroBubble,
}
HIDDEN, INNER, TOKENS, MICROBATCHES, LAYERS, TURNS = 4096, 1536, 16384, 8, 2, 9


class Layer(nn.Module):
    """A dense product, a shared expert and routed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.up = (nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=torch.bfloat16) for _ in range(2))
        self.block = Block(HIDDEN, INNER)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        result: Tensor = x + self.block(x) + F.silu(self.up(x))
        return result


class Stage(nn.Module):
    """Layers."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def compiled(precision: str) -> list[Stage]:
    """Both stages."""
    stages = [Stage(number).cuda() for number in range(2)]
    for stage in stages:
        stage.compile(backend="moecompile", fullgraph=True, options={"lowering": "eager", "precision": precision})
    return stages


def measure(precision: str) -> None:
    """All rows, with models of this precision."""
    like = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    x, target = (torch.randn(MICROBATCHES * TOKENS, HIDDEN, device="cuda").bfloat16() for _ in range(2))
    runs, pipelines = dict[str, Callable[[], None]](), dict[str, Any]()
    for name, make in SCHEDULES.items():
        stages = compiled(precision)
        schedule, pipelines[name] = pipeline_of(make, stages, MICROBATCHES, like)
        runs[name] = stepping(schedule, stages, x, target, apart="apart" in name)
    runs[ALONE] = loop(compiled(precision), x, target)  # last, or the others' graphs would be no stages'
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS + 2):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if turn > 1:
                times[name].append(begin.elapsed_time(end))
    for name, found in times.items():
        middle, first = statistics.median(found), statistics.median(times[ALONE])
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"{precision:<6} {name:<18} {middle:8.2f} ms  {middle / first:.3f} of {ALONE}  ({spread})", flush=True)
    for name, pipeline in pipelines.items():
        print(name, dict(pipeline.counts), dict(pipeline.apart))


def loop(stages: list[Stage], x: Tensor, target: Tensor) -> Callable[[], None]:
    """A step without a pipeline."""

    def run() -> None:
        for part, wanted in zip(x.chunk(MICROBATCHES), target.chunk(MICROBATCHES), strict=True):
            (F.mse_loss(stages[1](stages[0](part)).float(), wanted.float()) / MICROBATCHES).backward()
        for stage in stages:
            stage.zero_grad()

    return run


def stepping(schedule: Any, stages: list[Stage], x: Tensor, target: Tensor, apart: bool) -> Callable[[], None]:
    """A step of the schedule."""

    def run() -> None:
        known = pipelining.why_apart
        if apart:
            vars(pipelining)["why_apart"] = lambda *_: "they are to be"
        try:
            schedule.step(x, target=target)
        finally:
            vars(pipelining)["why_apart"] = known
        for stage in stages:
            stage.zero_grad()

    return run


def main() -> None:
    """BF16, and FP8."""
    with tempfile.TemporaryDirectory() as directory, alone(Path(directory)):
        for precision in ("model", "fp8"):
            torch._dynamo.reset()
            measure(precision)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
