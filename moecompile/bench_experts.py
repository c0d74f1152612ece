"""Blocks of experts: training sizes, forward and forward+backward, and the few tokens of decoding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moecompile.bench_block import (
    Block,
    Experts,
    adding,
    entrants,
    forward,
    precision,
    recomputing,
    step,
)
from moecompile.bench_cases import (
    ADDING,
    CALLS,
    EAGER,
    FORWARD,
    FP8,
    FP8_AGAIN,
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
from moecompile.bench_proof import EMULATED, WrongResultError, compare, prove
from moecompile.bench_results import Memory, Results, Setting, Speed, ratios
from moecompile.bench_timing import Call, Contender, Statistics, measure_back_to_back, measure_single

SETS, DECODE_SETS = 3, 16
BOUNDS = {"bf16": 0.02, "fp8": 0.15}
"""How far a contender's result and gradients may be from the eager baseline's: the norm of the difference, relative."""
OTHERS = (INDUCTOR, EAGER)


def measure_block(setting: Setting, shape: Shape) -> None:
    """One block: quantising the weights, inference, a training step and its memory."""
    block = Block.of(shape, SETS, setting.device)
    found = entrants(block, quantising=True)
    _quantise(setting, block)
    for what, make in ((FORWARD, forward), (STEP, step)):
        setting.results.head(f"block  {shape.title}  {what}")
        made = [make(block, *each) for each in (*found, *(recomputing(block) if what == STEP else ()))]
        present = _checked(setting, block, made, f"{shape.name} {what}", what == STEP)
        times = measure_single(setting.timer, present, setting.rounds)
        _add_speeds(setting, block, "block", what, present, times)
        if what == STEP and setting.device == "cuda":
            _add_memory(setting.results, block, present)
        for contender in present if setting.profile else ():
            if contender.name != EAGER:
                setting.results.head(f"    kernels of {contender.name}, {what}")
                setting.results.add(*kernels(setting, contender, "block", shape.name, what))
        block.forget_gradients()
    _measure_adding(setting, block, dict(found)[INDUCTOR])


def _measure_adding(setting: Setting, block: Block, inductor: Experts) -> None:
    """A training step whose gradients of matrices are added to main gradients."""
    setting.results.head(f"block  {block.shape.title}  {ADDING}")
    block.give_main_gradients()
    made = [step(block, *each) for each in adding(block, inductor)]
    present = _checked(setting, block, made, f"{block.shape.name} {ADDING}", True)
    times = measure_single(setting.timer, present, setting.rounds)
    _add_speeds(setting, block, "block", ADDING, present, times)
    block.forget_gradients()
    block.main = {}


def measure_decode(setting: Setting, shape: Shape, tokens: Sequence[int]) -> None:
    """Inference of few tokens: time on the GPU, and of calls as they come."""
    whole = Block.of(shape, 0, setting.device)
    whole.quantised = whole.quantise()
    for count in tokens:
        block = whole.with_tokens(count, DECODE_SETS)
        made = [forward(block, *each) for each in entrants(block, quantising=False)]
        present = _checked(setting, block, made, f"{shape.name} T{count}", False)
        graphs = _recorded(setting, present, f"{shape.name} T{count}, CUDA graph")
        on_gpu = {
            name: _each(all_sets) for name, all_sets in measure_single(setting.timer, graphs, setting.rounds).items()
        }
        setting.results.head(f"decode {block.shape.title}  {GPU_TIME}")
        _add_speeds(setting, block, "decode", GPU_TIME, graphs, on_gpu)
        del graphs
        calls = measure_back_to_back(
            setting.timer, present, setting.rounds, {each.name: 4 * DECODE_SETS for each in present}
        )
        setting.results.head(f"decode {block.shape.title}  {CALLS}")
        _add_speeds(setting, block, "decode", CALLS, present, calls)


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
    setting: Setting, block: Block, contenders: Sequence[Contender], what: str, with_gradients: bool
) -> list[Contender]:
    """Those that compute what the eager baseline computes, ours with our kernels; the others are noted as failures.

    Each has been called on all input sets.
    """
    (eager,) = (contender for contender in contenders if contender.name == EAGER)
    expected, right = _outcome(block, eager, with_gradients), []
    for contender in contenders:
        try:
            if contender.name != EAGER:
                bound = BOUNDS[precision(contender.name)]
                compare(_outcome(block, contender, with_gradients), expected, bound)
            prove(contender, range(len(block.sets)), setting.device)
            right.append(contender)
        except Exception as error:  # the others are measured all the same
            setting.results.fail(f"{what}, {contender.name}", error)
    return right


def _outcome(block: Block, contender: Contender, with_gradients: bool) -> dict[str, Tensor]:
    """The result, or the gradients, on the first input set; they are no longer the block's."""
    for each in block.main.values():
        each.zero_()
    result = contender.call(0)
    if not with_gradients:
        assert isinstance(result, Tensor)
        return {"result": result}
    found = {name: leaf.grad for name, leaf in block.leaves(block.inputs(0)).items()}
    found |= {name: each.clone() for name, each in block.main.items()}
    block.forget_gradients()
    missing = [name for name, gradient in found.items() if gradient is None]
    if missing:
        raise WrongResultError(f"no gradient of {', '.join(missing)}")
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _add_speeds(
    setting: Setting,
    block: Block,
    section: str,
    what: str,
    present: Sequence[Contender],
    times: Mapping[str, Statistics],
) -> None:
    case = block.shape.name if section == "block" else f"{block.shape.name} T{block.shape.tokens}"
    for contender in present:
        own = times[contender.name]
        others = {name: times[name].median for name in OTHERS if name in times and name != contender.name}
        moved = block.moved(1 if contender.precision == "fp8" else 2, what != FORWARD)
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
                EMULATED if setting.device == "cpu" and contender.name not in OTHERS else "",
            )
        )


def _add_memory(results: Results, block: Block, contenders: Sequence[Contender]) -> None:
    """Peaks of one step each. What is quantised in the step is held for its backward in part: the transposed copies."""
    copies, of_backward = size_of(block.quantised), size_of([*block.quantised[2:4], *block.quantised[6:8]])
    peaks = {each.name: peak(block, each) for each in contenders}
    over = {name: whole - gradients for name, (whole, gradients) in peaks.items()}
    for contender in contenders:
        name = contender.name
        made, held = of_backward if name == FP8_EACH else 0, copies if name in (FP8, FP8_AGAIN) else 0
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


def _quantise(setting: Setting, block: Block) -> None:
    """Makes the quantised weights, and measures that."""
    setting.results.head(f"block  {block.shape.title}  {QUANTISING}")
    contender = Contender(FP8, lambda _: block.quantise(), 0.0, "fp8", ("quantize_weights",))
    try:
        prove(contender, range(1), setting.device)
    except Exception as error:  # FP8 that needs them fails, too; the others are measured all the same
        setting.results.fail(f"{block.shape.name} {QUANTISING}, {FP8}", error)
        return
    times = measure_single(setting.timer, [contender], setting.rounds)
    block.quantised = block.quantise()
    copies = size_of(block.quantised)
    floor = setting.ceilings.floor(0.0, size_of((block.w_in, block.w_out)) + copies, "bf16")
    note = f"{copies / 2**30:.2f} GiB in both orientations{f', {EMULATED}' if setting.device == 'cpu' else ''}"
    row = ("block", block.shape.name, QUANTISING, FP8)
    setting.results.add(Speed(*row, times[FP8], floor=floor, note=note))


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
