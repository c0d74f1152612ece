"""Grouped GEMMs by themselves, against PyTorch's and against the ceiling: the largest dense product of cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from moecompile.bench_cases import ALONE, CEILING, FP8, FP8_COPYING, IN_A_ROW, OURS, SPEED_TARGETS, TORCH, Product
from moecompile.bench_results import Ceilings, Results, Setting, Speed, ratios
from moecompile.bench_timing import Absent, Contender, Statistics, Timer, measure_back_to_back, measure_single

SIDE = {"cuda": 8192, "cpu": 256}
"""Rows and columns of the dense products."""
COPIED = {"cuda": 2**31, "cpu": 2**24}
"""Bytes that the copy reads, and that it writes."""
PAUSE = {"cuda": 0.01, "cpu": 0.0}
"""Seconds in which the device cools down before a product that is timed alone."""
ROW = 30.0
"""Milliseconds of a row of products."""
BOUND = 0.01
"""How far our result may be from PyTorch's in BF16: the norm of the difference, relative."""
NAMES = {"bf16": "BF16", "fp8": "FP8"}


def measure_ceilings(timer: Timer, device: str, rounds: int, results: Results) -> Ceilings:
    """What the device reaches: dense products alone and in a row, and a copy."""
    results.head("ceilings")
    source = torch.empty(COPIED[device], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = Contender("copy", lambda _: target.copy_(source), 0.0)
    products = {f"{CEILING} {NAMES[precision]} {SIDE[device]}^3": dense(device, precision) for precision in NAMES}
    found = [*(replace(each, name=name) for name, each in products.items()), copy]
    alone = measure_single(timer, found, rounds, PAUSE[device])
    flops: dict[str, float] = {}
    for what, times in ((ALONE, alone), (IN_A_ROW, _in_a_row(timer, found, rounds, alone))):
        for each in found:
            note = "" if each.flops else f"{2 * COPIED[device] / times[each.name].median / 1e9:.2f} TB/s"
            results.add(Speed("ceiling", each.name, what, each.name, times[each.name], each.flops, note=note))
            if each.flops:
                rate = 1000 * each.flops / times[each.name].median
                flops[each.precision] = max(flops.get(each.precision, 0.0), rate)
    return Ceilings(flops, 2 * COPIED[device] / alone["copy"].median * 1000)


def measure_product(setting: Setting, product: Product, precision: str) -> None:
    """One grouped GEMM, alone and in a row: moecompile's, PyTorch's, and the dense product in the same rounds."""
    entered = [*entrants(product, precision, setting.device), dense(setting.device, precision)]
    present = [each for each in entered if isinstance(each, Contender)]
    absent = [each for each in entered if isinstance(each, Absent)]
    _check(present)
    alone = measure_single(setting.timer, present, setting.rounds, PAUSE[setting.device])
    in_a_row = _in_a_row(setting.timer, present, setting.rounds, alone)
    for when, times in ((ALONE, alone), (IN_A_ROW, in_a_row)):
        what = f"{NAMES[precision]}, {when}"
        setting.results.head(f"gemm   {product.name}  {what}")
        rates = {each.name: each.flops / times[each.name].median for each in present}
        for each in present:
            others = {name: rates[name] for name in _compared(each.name) if name in rates}
            moved = product.moved(1 if precision == "fp8" else 2)
            setting.results.add(
                Speed(
                    "gemm",
                    product.name,
                    what,
                    each.name,
                    times[each.name],
                    each.flops,
                    setting.ceilings.floor(each.flops, moved, precision) if each.name != CEILING else None,
                    ratios(rates[each.name], others),
                    SPEED_TARGETS.get((product.name, what, each.name)),
                )
            )
        setting.results.add(*(Speed("gemm", product.name, what, each.name, note=each.reason) for each in absent))


def _compared(name: str) -> tuple[str, ...]:
    """With whom a contender is compared."""
    return {CEILING: (), TORCH: (CEILING,)}.get(name, (TORCH, CEILING))


def _in_a_row(
    timer: Timer, contenders: Sequence[Contender], rounds: int, alone: Mapping[str, Statistics]
) -> Mapping[str, Statistics]:
    calls = {each.name: max(2, min(200, round(ROW / alone[each.name].median))) for each in contenders}
    return measure_back_to_back(timer, contenders, max(2, rounds // 2), calls)


def entrants(product: Product, precision: str, device: str) -> list[Contender | Absent]:
    """Those who compute a grouped GEMM, with operands of their own each that are the same for all."""
    torch.manual_seed(0)
    ends = torch.tensor(product.counts).cumsum(0).to(device, torch.int32)
    if precision == "fp8":
        return fp8_outer() if product.outer else fp8_products(product, ends, device)
    return bf16_outer(product, ends, device) if product.outer else bf16_products(product, ends, device)


def bf16_products(product: Product, ends: Tensor, device: str) -> list[Contender | Absent]:
    """Rows times their group's matrix."""
    a = torch.randn(product.rows, product.k, dtype=torch.bfloat16, device=device)
    b = torch.randn(len(product.counts), product.n, product.k, dtype=torch.bfloat16, device=device)
    out = torch.empty(product.rows, product.n, dtype=torch.bfloat16, device=device)

    def mine() -> Tensor:
        from moecompile.runtime import hopper

        return hopper.grouped_gemm(a, b.mT, ends, out)

    theirs = partial(torch._grouped_mm, a, b.mT, offs=ends)
    return _pair(OURS, mine, theirs, product, "bf16", device)


def bf16_outer(product: Product, ends: Tensor, device: str) -> list[Contender | Absent]:
    """Each group's rows, transposed, times its rows."""
    a = torch.randn(product.rows, product.k, dtype=torch.bfloat16, device=device)
    b = torch.randn(product.rows, product.n, dtype=torch.bfloat16, device=device)
    out = torch.empty(len(product.counts), product.k, product.n, dtype=torch.bfloat16, device=device)

    def mine() -> Tensor:
        from moecompile.runtime import hopper

        return hopper.grouped_outer(a, b, ends, out)

    return _pair(OURS, mine, partial(torch._grouped_mm, a.t(), b, offs=ends), product, "bf16", device)


def fp8_products(product: Product, ends: Tensor, device: str) -> list[Contender | Absent]:
    """Rows times their group's matrix: ours scaled in blocks of 1x128 and 128x128, PyTorch's by row and column."""
    groups = len(product.counts)
    a, b = quantised(device, product.rows, product.k), quantised(device, groups, product.n, product.k)
    lines = -(-product.k // 128)
    # one scale for each row and 128 columns, transposed in memory, its pitch a multiple of four
    scales = torch.rand(lines, -(-product.rows // 4) * 4, device=device)[:, : product.rows].t()
    b_scales = torch.rand(groups, -(-product.n // 128), lines, device=device)
    out = torch.empty(product.rows, product.n, dtype=torch.bfloat16, device=device)
    by_row = torch.rand(product.rows, device=device), torch.rand(groups, product.n, device=device)

    def mine() -> Tensor:
        from moecompile.runtime import hopper

        return hopper.grouped_gemm(a, b.mT, ends, out, a_scales=scales, b_scales=b_scales)

    def theirs() -> Tensor:
        return torch._scaled_grouped_mm(a, b.mT, *by_row, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True)

    return _pair(FP8, mine, theirs, product, "fp8", device)


def fp8_outer() -> list[Contender | Absent]:
    """The gradient of the weights in FP8, without and with the copies that it multiplies."""
    return [Absent(name, "not there yet") for name in (FP8, FP8_COPYING)]


def _pair(
    name: str, mine: Callable[[], Tensor], theirs: Callable[[], Tensor], product: Product, precision: str, device: str
) -> list[Contender | Absent]:
    """Ours and PyTorch's, where they run."""
    found: list[Contender | Absent] = []
    for who, run, missing in (
        (name, mine, "needs a Hopper GPU" if device == "cpu" else ""),
        (TORCH, theirs, "not on the CPU" if device == "cpu" and precision == "fp8" else ""),
    ):
        found.append(
            Absent(who, missing)
            if missing
            else Contender(who, partial(_ignoring_number, run), product.flops, precision)
        )
    return found


def _ignoring_number(run: Callable[[], Tensor], _: int) -> Tensor:
    return run()


def _check(contenders: Sequence[Contender]) -> None:
    """Raises unless ours and PyTorch's are the same product."""
    results = {each.name: each.call(0) for each in contenders if each.name in (OURS, TORCH)}
    if len(results) == 2:
        own, other = results.values()
        assert isinstance(own, Tensor) and isinstance(other, Tensor)
        error, whole = (torch.linalg.vector_norm(each, dtype=torch.float32) for each in (own - other, other))
        if not float(error / whole) <= BOUND:
            raise ArithmeticError(f"{OURS} is {float(error / whole):.3g} away from torch._grouped_mm")


@cache
def dense(device: str, precision: str) -> Contender:
    """The ceiling: cuBLAS's product of two square matrices, in FP8 with one scale for each."""
    side = SIDE[device]
    flops = 2.0 * side**3
    if precision == "bf16":
        a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
        out = torch.empty_like(a)
        return Contender(CEILING, lambda _: torch.mm(a, b.t(), out=out), flops)
    left, right = quantised(device, side, side), quantised(device, side, side)
    one = torch.ones((), device=device)

    def scaled(_: int) -> Tensor:
        return torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return Contender(CEILING, scaled, flops, "fp8")


def quantised(device: str, *shape: int) -> Tensor:
    """Random numbers as they are in e4m3 after scaling: the largest of a block near 448. Made slice by slice."""
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    for part in out if len(shape) == 3 else out.split(4096):
        part.copy_(torch.randn(part.shape, device=device).mul_(80).clamp_(-448, 448))
    return out
