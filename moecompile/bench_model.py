"""Blocks of a model under torch.compile: what is left of the kernels' speed inside of one, and what the block gains.

    torch.compile(block, backend="moecompile")     torch.compile(block)     block

moecompile's also with its experts in FP8, their matrices cast before (`fp8_cache_weights`) or in every forward. The
block is one of transformers' with its router, as its users compile it. Its experts' kernels are compared with those of
the bench's own call of moecompile's operators on the same matrices, tokens and routing: torch's profiler adds up the
time of moecompile's kernels, and nothing else, in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moecompile import bench_block
from moecompile.bench_cases import (
    EAGER,
    EXPERT_KERNELS,
    FORWARD,
    IN_BENCH,
    IN_MODEL,
    INDUCTOR,
    OURS,
    SPEED_TARGETS,
    STEP,
    WHOLE_BLOCK,
    Shape,
)
from moecompile.bench_compiled import OPTIONS, checked, compiled, forward, step
from moecompile.bench_modules import Module, missing
from moecompile.bench_products import HOPPER
from moecompile.bench_profile import own_kernels
from moecompile.bench_proof import EMULATED, prove
from moecompile.bench_results import Setting, Speed, ratios
from moecompile.bench_timing import Contender, Statistics, Timing, alternate, measure_single

ROUNDS = 5
"""Turns of each under the profiler, at most; each is a few calls long."""
BOUNDS = {"bf16": 0.1, "fp8": 0.2}
"""How far results and gradients may be from eager's, relative: a token whose experts tie may get another one."""


def measure_model(setting: Setting, shape: Shape) -> None:
    """One block, forward and forward+backward: the whole block, and the experts' kernels in it."""
    if reason := missing():
        setting.results.head(f"model  {shape.title}")
        setting.results.add(Speed("model", shape.name, WHOLE_BLOCK, OURS, note=reason))
        return
    torch._dynamo.reset()
    block = Module.of(shape, setting.device)
    runs: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        *((name, compiled(block.module, options)) for name, options in OPTIONS.items()),
        (INDUCTOR, compiled(block.module)),
        (EAGER, block.module),
    ]
    for what in (FORWARD, STEP):
        setting.results.head(f"model  {shape.title}  {what}, {WHOLE_BLOCK} ({type(block.module).__name__})")
        make = forward if what == FORWARD else step
        present = checked(
            setting,
            block,
            [make(block, *each) for each in runs],
            against=EAGER,
            bounds=BOUNDS,
            title=f"model {shape.name} {what}",
            where="the block",
        )
        times = measure_single(setting.timer, present, setting.rounds)
        _add_blocks(setting, shape, what, times)
        setting.results.head(f"model  {shape.title}  {what}, {EXPERT_KERNELS}")
        for each in present:
            if each.name == OURS:
                _measure_kernels(setting, block, each, what)
        block.forget_gradients()


def _add_blocks(setting: Setting, shape: Shape, what: str, times: Mapping[str, Statistics]) -> None:
    """The whole block's rows: it has a router besides experts, so that neither rate nor floor is stated."""
    for name, own in times.items():
        others = {other: 1 / times[other].median for other in (INDUCTOR, EAGER) if other in times}
        faster = ratios(1 / own.median, others) if name in OPTIONS else {}
        note = EMULATED if setting.device == "cpu" and name in OPTIONS else ""
        setting.results.add(Speed("model", shape.name, f"{what}, {WHOLE_BLOCK}", name, own, ratios=faster, note=note))


def _measure_kernels(setting: Setting, block: Module, in_model: Contender, what: str) -> None:
    """The time of moecompile's kernels in the compiled block and in the bench's own call, by turns."""
    shape, title = block.experts.shape, f"{what}, {EXPERT_KERNELS}"
    if setting.device == "cpu":
        setting.results.add(Speed("model", shape.name, title, IN_MODEL, note=HOPPER))
        return
    make = bench_block.forward if what == FORWARD else bench_block.step
    in_bench = make(block.experts, OURS, bench_block.ours(block.experts))
    prove(in_bench, range(1), setting.device)
    counts: dict[str, float] = {}

    def measure(contender: Contender, number: int) -> Timing:
        counts[contender.name], milliseconds = own_kernels(setting, contender)
        return Timing(milliseconds, 0.0)

    flops = shape.flops * (3 if what == STEP else 1)
    contenders = [Contender(IN_MODEL, in_model.call, flops), Contender(IN_BENCH, in_bench.call, flops)]
    alternate(contenders, 1, measure)  # the profiler's first look is its slowest
    times = alternate(contenders, min(setting.rounds, ROUNDS), measure)
    floor = setting.ceilings.floor(flops, block.experts.moved(2, what == STEP), "bf16")
    for name, own in times.items():
        faster = ratios(1 / own.median, {IN_BENCH: 1 / times[IN_BENCH].median}) if name == IN_MODEL else {}
        target = SPEED_TARGETS.get((shape.name, title, name))
        note = f"{counts[name]:g} kernels"
        setting.results.add(Speed("model", shape.name, title, name, own, flops, floor, faster, target, note))
