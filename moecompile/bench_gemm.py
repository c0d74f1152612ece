"""Grouped GEMMs by themselves, against PyTorch's and against the ceiling: the largest dense product of cuBLAS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moecompile.bench_cases import ALONE, BURST, BURST_CALLS, CEILING, IN_A_ROW, SPEED_TARGETS, TORCH, Product
from moecompile.bench_products import SIDE, Entrant, dense, entrants
from moecompile.bench_proof import compare, prove
from moecompile.bench_results import Ceilings, Results, Setting, Speed, ratios
from moecompile.bench_timing import Absent, Contender, Statistics, Timer, measure_back_to_back, measure_single

COPIED = {"cuda": 2**31, "cpu": 2**22}
"""Bytes that the copy reads, and that it writes."""
PAUSE = {"cuda": 0.01, "cpu": 0.0}
"""Seconds in which the device cools down before a product that is timed alone."""
ROW = 30.0
"""Milliseconds of a row of products."""
NAMES = {"bf16": "BF16", "fp8": "FP8"}
BOUND = 0.02
"""How far our product may be from PyTorch's: the norm of the difference, relative."""


def measure_ceilings(timer: Timer, device: str, rounds: int, results: Results) -> Ceilings:
    """What the device reaches: dense products alone, in bursts and in a row, and a copy."""
    results.head("ceilings")
    source = torch.empty(COPIED[device], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    products = {f"{CEILING} {NAMES[precision]} {SIDE[device]}^3": dense(device, precision) for precision in NAMES}
    found = [replace(each, name=name) for name, each in products.items()]
    found.append(Contender("copy", lambda _: target.copy_(source), 0.0))
    alone = measure_single(timer, found, rounds, PAUSE[device])
    bursts = measure_single(timer, found, rounds, PAUSE[device], BURST_CALLS)
    in_a_row = _in_a_row(timer, found, rounds, alone)
    flops: dict[str, float] = {}
    for what, times in ((ALONE, alone), (BURST, bursts), (IN_A_ROW, in_a_row)):
        for each in found:
            rate = 1000 * (each.flops or 2 * COPIED[device]) / times[each.name].median
            note = what if each.flops else f"{what}, {rate / 1e12:.2f} TB/s"
            results.add(Speed("ceiling", each.name, what, each.name, times[each.name], each.flops, note=note))
            if each.flops:
                flops[each.precision] = max(flops.get(each.precision, 0.0), rate)
    return Ceilings(flops, 2000 * COPIED[device] / min(times["copy"].median for times in (alone, bursts, in_a_row)))


def measure_product(setting: Setting, product: Product, precision: str) -> None:
    """One grouped GEMM, in bursts and in a row: moecompile's, PyTorch's, and the dense product in the same rounds."""
    entered = entrants(product, precision, setting.device)
    right = _checked(setting, entered, f"{product.name} {NAMES[precision]}")
    present = [*(each for each in right if isinstance(each, Contender)), dense(setting.device, precision)]
    absent = [each for each in right if isinstance(each, Absent)]
    bursts = measure_single(setting.timer, present, setting.rounds, PAUSE[setting.device], BURST_CALLS)
    in_a_row = _in_a_row(setting.timer, present, setting.rounds, bursts)
    for when, times in ((BURST, bursts), (IN_A_ROW, in_a_row)):
        what = f"{NAMES[precision]}, {when}"
        setting.results.head(f"gemm   {product.name}  {what}")
        rates = {each.name: each.flops / times[each.name].median for each in present}
        for each in present:
            others = {other: rates[other] for other in _compared(each.name) if other in rates}
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


def _checked(setting: Setting, entered: Sequence[Entrant], what: str) -> list[Entrant]:
    """Those that run, ours only if it is PyTorch's product and our kernel's; the others are noted as failures."""
    products: dict[str, Tensor] = {}
    right: list[Entrant] = []
    for entrant in reversed(entered):  # PyTorch's comes last
        if isinstance(entrant, Absent):
            right.insert(0, entrant)
            continue
        try:
            product = entrant.call(0)
            assert isinstance(product, Tensor)
            if TORCH in products:
                compare({"it": product}, {"it": products[TORCH]}, BOUND)
            prove(entrant, range(1), setting.device)
            products[entrant.name] = product
            right.insert(0, entrant)
        except Exception as error:  # the others are measured all the same
            if entrant.name == TORCH:
                right.insert(0, Absent(TORCH, " ".join(f"does not run: {error}".split())[:200]))
            else:
                setting.results.fail(f"{what}, {entrant.name}", error)
    return right
