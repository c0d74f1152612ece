"""`python -m moecompile bench model`: whole decoder layers of transformers under torch.compile, forward and step.

    torch.compile(layers, backend="moecompile", options={"precision": "fp8"})     torch.compile(layers)

moecompile's in bfloat16 and in FP8, the matrices cast before (`fp8_cache_weights`), in every forward, or once more in
every backward (`fp8_recast_weights`), against Inductor's in bfloat16: time, what is held for the backward, and where
the time of a training step goes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import moecompile
from moecompile.bench_cases import (
    CASTS,
    FORWARD,
    FP8,
    FP8_EACH,
    FP8_TWICE,
    HELD,
    INDUCTOR,
    LAYER_TARGETS,
    MOST_CASTS,
    OURS,
    STEP,
    Shape,
)
from moecompile.bench_compiled import OPTIONS, checked, compiled, forward, step
from moecompile.bench_modules import missing
from moecompile.bench_profile import averages, dearest
from moecompile.bench_proof import EMULATED
from moecompile.bench_results import Kernel, Memory, Setting, Speed, Target, ratios
from moecompile.bench_stacks import Stack
from moecompile.bench_timing import Contender, Statistics, measure_single
from moecompile.passes import decompose
from moecompile.passes.casts import Cast
from moecompile.runtime.quantize import pad

BOUNDS = {"bf16": 0.1, "fp8": 0.3}
"""How far results may be from Inductor's, relative: a token whose experts nearly tie may get another one."""
KINDS = (
    ("attention", ("sdpa", "flash", "fmha", "convert_dq", "dot_do_o")),
    ("quantising the weights", ("moecompile_quantize_weights",)),
    (CASTS, ("moecompile_quantize", "moecompile_transpose", "moecompile_pad_offsets")),
    ("products", ("moecompile_gemm", "moecompile_grouped_gemm", "nvjet", "gemm", "cutlass", "Grouped", "13device_k")),
)
"""What a kernel is for, by a part of its name; the first that fits."""
REST = "the rest"
LISTED = 40
"""Kernels of a step that `--profile` lists by name."""


def measure_layers(setting: Setting, shape: Shape, layers: int, sequence: int) -> None:
    """So many layers, forward and forward+backward."""
    if reason := missing():
        setting.results.head(f"model  {shape.title}")
        setting.results.add(Speed("model", shape.name, FORWARD, OURS, note=reason))
        return
    moecompile.reset()
    stack = Stack.of(shape, layers, sequence, setting.device)
    runs = {INDUCTOR: compiled(stack.module)}
    runs |= {name: compiled(stack.module, options) for name, options in OPTIONS.items()}
    for what, make in ((FORWARD, forward), (STEP, step)):
        torch._dynamo.reset()  # graphs of the other are of no use here, and Dynamo allows a function so many only
        if what == STEP:
            runs[FP8_TWICE] = compiled(stack.module, OPTIONS[FP8_EACH] | {"fp8_recast_weights": True})
        setting.results.head(f"model  {stack.title}  {what}")
        present = checked(
            setting,
            stack,
            [make(stack, *each) for each in runs.items()],
            against=INDUCTOR,
            bounds=BOUNDS,
            title=f"model {stack.case} {what}",
            where="the layers",
            gradients=["x"],  # which all others have passed through
        )
        _add_speeds(setting, stack, what, measure_single(setting.timer, present, setting.rounds))
        if what == STEP:
            if setting.device == "cuda":
                _add_memory(setting, stack, {each.name: runs[each.name] for each in present})
            _add_kinds(setting, stack, [each for each in present if each.name == INDUCTOR])
            with casts_apart():
                _add_kinds(setting, stack, [step(stack, FP8_EACH, compiled(stack.module, OPTIONS[FP8_EACH]))])
        stack.forget_gradients()


@contextlib.contextmanager
def casts_apart() -> Iterator[None]:
    """What is compiled within casts rows in kernels by themselves, so that they can be told apart.

    They take somewhat longer so than fused with a norm or an activation.
    """
    torch._dynamo.reset()  # another graph of the same code; and Dynamo allows a function so many only
    with decompose.casts_apart(), inductor_config.patch(force_disable_caches=True):
        yield


def _add_speeds(setting: Setting, stack: Stack, what: str, times: Mapping[str, Statistics]) -> None:
    for name, own in times.items():
        others = {INDUCTOR: 1 / times[INDUCTOR].median} if INDUCTOR in times else {}
        faster = ratios(1 / own.median, others) if name != INDUCTOR else {}
        target = LAYER_TARGETS.get((stack.shape.name, what, name))
        note = EMULATED if setting.device == "cpu" and name != INDUCTOR else ""
        setting.results.add(Speed("model", stack.case, what, name, own, ratios=faster, target=target, note=note))


def _add_memory(setting: Setting, stack: Stack, runs: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    """What a forward leaves to be held for its backward, without gradients and without FP8 copies of the matrices."""
    found: dict[str, tuple[int, int]] = {}
    for name, run in runs.items():
        stack.forget_gradients()
        run(stack.x).backward(stack.cotangent)  # workspaces and kept copies are there then
        stack.forget_gradients()
        setting.timer.synchronize()
        before = torch.cuda.memory_allocated()
        result = run(stack.x)
        setting.timer.synchronize()
        held = torch.cuda.memory_allocated() - before
        result.backward(stack.cotangent)
        del result
        found[name] = held, copied(stack.module, moecompile.last_report().casts) if name == FP8_EACH else 0
    for name, (held, copies) in found.items():
        others = {INDUCTOR: 1 / found[INDUCTOR][0]} if INDUCTOR in found else {}
        smaller = ratios(1 / max(held - copies, 1), others) if name != INDUCTOR else {}
        target = Target(1.0, INDUCTOR) if name in (FP8, FP8_EACH, FP8_TWICE) else None
        setting.results.add(
            Memory("model", stack.case, HELD, name, held, 0, copies, ratios=smaller, target=target, label="held")
        )


def copied(module: nn.Module, casts: Sequence[Cast]) -> int:
    """Bytes of the FP8 copies that a training step holds for its backward, of what is cast: the transposed ones."""
    total = 0
    for row in casts:
        if not row.cast:
            continue
        for parameter in module.get_submodule(row.module).parameters(recurse=row.kind == "experts"):
            if parameter.dim() >= 2:
                *outer, n, k = parameter.shape
                total += torch.Size(outer).numel() * pad(n) * pad(k)
    return total


def _add_kinds(setting: Setting, stack: Stack, contenders: Sequence[Contender]) -> None:
    """Where the time of a step goes."""
    for contender in contenders:
        apart = ", casts of rows by themselves" if contender.name == FP8_EACH else ""
        setting.results.head(f"    where the step of {contender.name} goes{apart}")
        contender.call(0)
        contender.call(1)
        kernels = averages(setting, contender)
        found = dict.fromkeys((*(kind for kind, _ in KINDS), REST), (0.0, 0.0))
        for name, count, milliseconds in kernels:
            kind = kind_of(name)
            found[kind] = found[kind][0] + count, found[kind][1] + milliseconds
        total = sum(milliseconds for _, milliseconds in found.values()) or 1.0
        row = ("model", stack.case, STEP, contender.name)
        for kind, (count, milliseconds) in found.items():
            judged = setting.device == "cuda" and kind == CASTS and contender.name == FP8_EACH
            share = milliseconds / total
            setting.results.add(Kernel(*row, kind, count, milliseconds, share, most=MOST_CASTS if judged else None))
        if setting.profile:
            setting.results.add(*(Kernel(*row, *each) for each in dearest(kernels, LISTED)))


def kind_of(kernel: str) -> str:
    """What a kernel is for."""
    return next((kind for kind, parts in KINDS if any(part in kernel for part in parts)), REST)
