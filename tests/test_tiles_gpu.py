"""The tiles that the rules choose, against all others, for sizes of real models.

    pytest -s -m slow tests/test_tiles_gpu.py

Half a minute on one H200. Random routing, 16 bits, medians by turns, each call on cold caches.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from moecompile.codegen import cubins
from moecompile.codegen.gemms import GroupedGemm
from moecompile.runtime import hopper, hopper_tiles
from moecompile.runtime.hopper_tiles import Projection

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.slow  # by itself: it measures

SILU = "mul(silu(gate), up)"
MODELS = {  # hidden, intermediate, experts, top-k
    "deepseek-v2-lite": (2048, 1408, 64, 6),
    "qwen3-30b": (2048, 768, 128, 8),
    "qwen3-235b": (4096, 1536, 128, 8),
    "granite": (1536, 512, 40, 8),
    "phi-3.5": (4096, 6400, 16, 2),
    "llama-4": (5120, 8192, 16, 1),
    "gpt-oss": (2880, 2880, 128, 4),
    "mixtral": (4096, 14336, 8, 2),
    "deepseek-v3": (7168, 2048, 64, 8),
}
TOKENS = (64, 1024, 2048, 8192)
ALL = [
    *(GroupedGemm("bfloat16", 256, stages, cluster) for stages in (4, 3) for cluster in (1, 2)),
    *(GroupedGemm("bfloat16", 256, stages, 2, overhang=overhang) for stages, overhang in hopper_tiles.OVERHANG.items()),
    GroupedGemm("bfloat16", 128, 5, 1),
]
THREE = [each for each in ALL if each.stages == 3]
BOUND, MEAN = 1.15, 1.015
"""What a rule may cost at worst and on average, in times of the best tile: 1.12 and 1.007 when measured, and noise."""

ACTIVATED, BACKWARD = hopper_tiles.activated_instance, hopper_tiles.backward_instance
"""The rules, which the cases replace."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One product: what the rule chooses, and the calls of all tiles that could compute it."""

    name: str
    rule: GroupedGemm
    calls: dict[GroupedGemm, Call]


def cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """Every product of a block, forward and backward, but for gradients of matrices."""

    def case(name: str, tiles: list[GroupedGemm], rule: GroupedGemm, call: Callable[[GroupedGemm], Call]) -> Case:
        alike = [replace(each, transposed=rule.transposed, epilogue=rule.epilogue) for each in tiles]
        return Case(name, rule, {each: call(each) for each in alike})

    def by_rule(name: str, call: Call) -> Callable[[GroupedGemm], Call]:
        def with_tile(instance: GroupedGemm) -> object:
            monkeypatch.setattr(hopper, name, lambda *_: instance)
            return call()

        return lambda instance: partial(with_tile, instance)

    def of_tile(gemm: Callable[..., object]) -> Callable[[GroupedGemm], Call]:
        return lambda instance: partial(gemm, instance=instance)

    for (model, (hidden, inner, experts, top_k)), tokens in product(MODELS.items(), TOKENS):
        title, rows = f"{model} T{tokens}", tokens * top_k
        ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
        offsets = torch.bincount(ids.flatten(), minlength=experts).cumsum(0).int()
        order, scales = ids.flatten().argsort().int(), torch.rand(rows, 1, device="cuda")
        w_in, w_out = normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)
        x, a, of_rows, y = normal(rows, hidden), normal(rows, inner), normal(rows, 2 * inner), normal(rows, hidden)
        projection = Projection(tuple(w_in.mT.chunk(2, 2)), None, "halves")
        first = partial(hopper.activated_gemm, x, projection, SILU, offsets, a)
        back = partial(hopper.activation_backward, y, w_out.mT, projection, SILU, offsets, of_rows, order)
        given = (torch.bfloat16, rows)
        rule = ACTIVATED(*given, projection, SILU, False)
        yield case(f"{title} GEMM1", ALL, rule, by_rule("activated_instance", first))
        rule = ACTIVATED(*given, projection, SILU, True)
        yield case(f"{title} GEMM1, saved", THREE, rule, by_rule("activated_instance", partial(first, hidden=of_rows)))
        rule = BACKWARD(*given, w_out.mT, "halves", SILU, True)
        call = by_rule("backward_instance", partial(back, weights=None, scales=scales))
        yield case(f"{title} activation's backward", [each for each in THREE if not each.overhang], rule, call)
        for name, left, matrices, transposed in (
            ("GEMM2", a, w_out.mT, False),
            ("tokens' gradient", of_rows, w_in, True),
        ):
            rule = hopper_tiles.choose(*given, experts, hidden, left.shape[1], transposed)
            gemm = partial(hopper.grouped_gemm, left, matrices, offsets, y)
            yield case(f"{title} {name}", ALL, rule, of_tile(gemm))


def normal(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_().mul_(shape[-1] ** -0.5)


def microseconds(call: Call, flushed: Tensor) -> float:
    """Of one call of three in a row, on caches that were overwritten before."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()
    torch.cuda._sleep(1_000_000)  # the host gets ahead
    begin.record()
    for _ in range(3):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 3 * 1000


def test_the_rules_choose_tiles_that_are_among_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    flushed, ratios = torch.empty(2**27, dtype=torch.int8, device="cuda"), dict[str, float]()
    for case in cases(monkeypatch):
        cubins.build(list(case.calls))
        turns = list(case.calls)
        times: dict[GroupedGemm, list[float]] = {each: [] for each in turns}
        for turn in range(8):
            random.shuffle(turns)
            for each in turns:
                time = microseconds(case.calls[each], flushed)
                if turn:  # the first loads the kernel
                    times[each].append(time)
        medians = {each: statistics.median(found) for each, found in times.items()}
        best = min(medians, key=lambda each: medians[each])
        ratios[case.name] = medians[case.rule] / medians[best]
        if ratios[case.name] > 1.02:
            named = ", ".join(
                f"{each.columns}x{each.stages}x{each.cluster}+{each.overhang} {medians[each]:.0f}"
                for each in (case.rule, best)
            )
            print(f"{case.name}: {ratios[case.name]:.3f} (rule and best: {named} us)")
    close = sum(ratio <= 1.02 for ratio in ratios.values())
    mean, worst = statistics.mean(ratios.values()), max(ratios, key=lambda name: ratios[name])
    print(f"{len(ratios)} products, {close} within 2 % of the best tile; mean {mean:.3f}, {worst} {ratios[worst]:.3f}")
    assert mean <= MEAN and ratios[worst] <= BOUND, ratios
