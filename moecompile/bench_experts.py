"""Blocks of experts: training sizes, forward and forward+backward, and the few tokens of decoding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moecompile.bench_block import Block, entrants, forward, precision, step
from moecompile.bench_cases import (
    CALLS,
    EAGER,
    FORWARD,
    FP8,
    FP8_EACH,
    GPU_TIME,
    INDUCTOR,
    MEMORY_TARGETS,
    QUANTISING,
    SPEED_TARGETS,
    STEP,
    Shape,
)
from moecompile.bench_profile import kernels
from moecompile.bench_results import Memory, Results, Setting, Speed, ratios
from moecompile.bench_timing import (
    Absent,
    Call,
    Contender,
    Statistics,
    measure_back_to_back,
    measure_single,
)

SETS, DECODE_SETS = 3, 16
BOUNDS = {"bf16": 0.02, "fp8": 0.15}
"""How far a contender's result and gradients may be from the eager baseline's: the norm of the difference, relative."""
OTHERS = (INDUCTOR, EAGER)


class WrongResultError(Exception):
    """A contender computes something else."""


def measure_block(setting: Setting, shape: Shape) -> None:
    """One block: quantising the weights, inference, a training step and its memory."""
    block = Block.of(shape, SETS, setting.device)
    found = entrants(block, quantising=True)
    absent = [each for each in found if isinstance(each, Absent)]
    _quantise(setting, block, absent)
    for what, make in ((FORWARD, forward), (STEP, step)):
        setting.results.head(f"block  {shape.title}  {what}")
        made = [make(block, *each) for each in found if not isinstance(each, Absent)]
        present = _checked(block, made, f"{shape.name} {what}", what == STEP, setting.results)
        times = measure_single(setting.timer, present, setting.rounds)
        _add_speeds(setting, block, "block", what, present, absent, times)
        if what == STEP and setting.device == "cuda":
            _add_memory(setting.results, block, present)
        for contender in present if setting.profile else ():
            if contender.name != EAGER:
                setting.results.head(f"    kernels of {contender.name}, {what}")
                setting.results.add(*kernels(setting, contender, "block", shape.name, what))
        block.forget_gradients()


def measure_decode(setting: Setting, shape: Shape, tokens: Sequence[int]) -> None:
    """Inference of few tokens: time on the GPU, and of calls as they come."""
    whole = Block.of(shape, 0, setting.device)
    for count in tokens:
        block = whole.with_tokens(count, DECODE_SETS)
        found = entrants(block, quantising=False)
        absent = [each for each in found if isinstance(each, Absent)]
        if not absent and not whole.quantised:
            whole.quantised = block.quantised = block.quantise()
        made = [forward(block, *each) for each in found if not isinstance(each, Absent)]
        present = _checked(block, made, f"{shape.name} T{count}", False, setting.results)
        for contender in present:
            for number in range(DECODE_SETS):
                contender.call(number)
        graphs = _recorded(setting, present, f"{shape.name} T{count}, CUDA graph")
        on_gpu = {
            name: _each(all_sets) for name, all_sets in measure_single(setting.timer, graphs, setting.rounds).items()
        }
        setting.results.head(f"decode {block.shape.title}  {GPU_TIME}")
        _add_speeds(setting, block, "decode", GPU_TIME, graphs, absent, on_gpu)
        del graphs
        calls = measure_back_to_back(
            setting.timer, present, setting.rounds, {each.name: 4 * DECODE_SETS for each in present}
        )
        setting.results.head(f"decode {block.shape.title}  {CALLS}")
        _add_speeds(setting, block, "decode", CALLS, present, absent, calls)


def _recorded(setting: Setting, contenders: Sequence[Contender], what: str) -> list[Contender]:
    """Each with all its input sets in one call."""
    found: list[Contender] = []
    for contender in contenders:
        try:
            run = setting.timer.recorded([partial(contender.call, number) for number in range(DECODE_SETS)])
        except Exception as error:  # the others are measured all the same
            setting.results.fail(f"{what}, {contender.name}", error)
            continue
        found.append(replace(contender, call=partial(_ignoring_number, run)))
    return found


def _ignoring_number(run: Call, _: int) -> object:
    return run()


def _each(all_sets: Statistics) -> Statistics:
    """The time of one of the calls that were recorded together."""
    low, high = (quartile / DECODE_SETS for quartile in all_sets.quartiles)
    return replace(
        all_sets, median=all_sets.median / DECODE_SETS, quartiles=(low, high), host=all_sets.host / DECODE_SETS
    )


def _checked(
    block: Block, contenders: Sequence[Contender], what: str, with_gradients: bool, results: Results
) -> list[Contender]:
    """Those that run and compute what the eager baseline computes; the others are noted as failures."""
    (eager,) = (contender for contender in contenders if contender.name == EAGER)
    expected, right = _outcome(block, eager, with_gradients), []
    for contender in contenders:
        try:
            if contender.name != EAGER:
                _compare(_outcome(block, contender, with_gradients), expected, contender.name)
            right.append(contender)
        except Exception as error:  # the others are measured all the same
            results.fail(f"{what}, {contender.name}", error)
    return right


def _outcome(block: Block, contender: Contender, with_gradients: bool) -> dict[str, Tensor]:
    """The result, or the gradients, on the first input set; they are no longer the block's."""
    result = contender.call(0)
    if not with_gradients:
        assert isinstance(result, Tensor)
        return {"result": result}
    found = {name: leaf.grad for name, leaf in block.leaves(block.inputs(0)).items()}
    block.forget_gradients()
    missing = [name for name, gradient in found.items() if gradient is None]
    if missing:
        raise WrongResultError(f"no gradient of {', '.join(missing)}")
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    bound = BOUNDS[precision(name)]
    for what, right in expected.items():
        norm = float(torch.linalg.vector_norm(right, dtype=torch.float32))
        error = float(torch.linalg.vector_norm(found[what] - right, dtype=torch.float32)) / norm
        if not error <= bound or math.isnan(error):
            raise WrongResultError(f"{what} is {error:.3g} away from the eager baseline's, more than {bound:g}")


def _add_speeds(
    setting: Setting,
    block: Block,
    section: str,
    what: str,
    present: Sequence[Contender],
    absent: Sequence[Absent],
    times: Mapping[str, Statistics],
) -> None:
    case = block.shape.name if section == "block" else f"{block.shape.name} T{block.shape.tokens}"
    for contender in present:
        own = times[contender.name]
        others = {name: times[name].median for name in OTHERS if name in times and name != contender.name}
        moved = block.moved(1 if contender.precision == "fp8" else 2, what == STEP)
        setting.results.add(
            Speed(
                section,
                case,
                what,
                contender.name,
                own,
                contender.flops,
                setting.ceilings.floor(contender.flops, moved, contender.precision),
                {} if contender.name in OTHERS else ratios(1 / own.median, {n: 1 / t for n, t in others.items()}),
                SPEED_TARGETS.get((case, what, contender.name)),
            )
        )
    setting.results.add(*(Speed(section, case, what, each.name, note=each.reason) for each in absent))


def _add_memory(results: Results, block: Block, contenders: Sequence[Contender]) -> None:
    """Peaks of one step each."""
    copies = size_of(block.quantised)
    peaks = {each.name: peak(block, each) for each in contenders}
    over = {name: whole - gradients for name, (whole, gradients) in peaks.items()}
    for contender in contenders:
        name = contender.name
        made, held = copies if name == FP8_EACH else 0, copies if name == FP8 else 0
        own = over[name] - made
        others = {other: over[other] / own for other in OTHERS if other in over and other != name and own > 0}
        whole, gradients = peaks[name]
        target = MEMORY_TARGETS.get((block.shape.name, name))
        results.add(Memory("block", block.shape.name, STEP, name, whole, gradients, made, held, others, target))


def peak(block: Block, contender: Contender) -> tuple[int, int]:
    """Bytes that a step holds at most beyond what was held before it, and of these its gradients."""
    block.forget_gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    contender.call(0)
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - held
    total = size_of(leaf.grad for leaf in block.leaves(block.inputs(0)).values() if leaf.grad is not None)
    block.forget_gradients()
    return most, total


def _quantise(setting: Setting, block: Block, absent: Sequence[Absent]) -> None:
    """Makes the quantised weights, if there is FP8, and measures that."""
    setting.results.head(f"block  {block.shape.title}  {QUANTISING}")
    row = ("block", block.shape.name, QUANTISING)
    for each in absent:
        if each.name == FP8:
            setting.results.add(Speed(*row, each.name, note=each.reason))
            return
    contender = Contender(FP8, lambda _: block.quantise(), 0.0)
    times = measure_single(setting.timer, [contender], setting.rounds)
    block.quantised = block.quantise()
    copies = size_of(block.quantised)
    floor = setting.ceilings.floor(0.0, size_of((block.w_in, block.w_out)) + copies, "bf16")
    setting.results.add(
        Speed(*row, FP8, times[FP8], floor=floor, note=f"{copies / 2**30:.2f} GiB in both orientations"),
    )


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
