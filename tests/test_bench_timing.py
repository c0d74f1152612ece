"""The bench's clocks and records: turns, statistics, floors, targets, print and JSON."""

from __future__ import annotations

import itertools
import json
from typing import ClassVar

import pytest
import torch

from moecompile import bench_cases
from moecompile.bench_cases import BLOCKS, DECODE, DECODE_TOKENS, MODELS, PRODUCTS, SPEED_TARGETS
from moecompile.bench_modules import BUILDERS
from moecompile.bench_results import Ceilings, Floor, Kernel, Memory, Results, Speed, Target, ratios, verdict
from moecompile.bench_timing import (
    Contender,
    CudaTimer,
    HostTimer,
    Statistics,
    Timing,
    alternate,
    measure_back_to_back,
    measure_single,
)


def test_statistics():
    found = Statistics.of([Timing(time, 10 * time, time < 9) for time in (4.0, 1.0, 3.0, 2.0, 10.0)])
    assert found == Statistics(3.0, (2.0, 4.0), 30.0, 5, False)
    assert found.spread == pytest.approx(2 / 3)
    assert Statistics.of([Timing(5.0, 1.0)]) == Statistics(5.0, (5.0, 5.0), 1.0, 1)


def contenders(calls: list[tuple[str, int]], *names: str) -> list[Contender]:
    """They note when they are called."""

    def contender(name: str) -> Contender:
        return Contender(name, lambda number: calls.append((name, number)), 1.0)

    return [contender(name) for name in names]


def test_contenders_take_turns():
    calls: list[tuple[str, int]] = []
    entered = contenders(calls, "ours", "theirs", "ceiling")
    times = itertools.count(1)

    def measure(contender: Contender, number: int) -> Timing:
        contender.call(number)
        return Timing(next(times), 0.0)

    found = alternate(entered, 3, measure)
    assert calls == [(name, number) for number in range(3) for name in ("ours", "theirs", "ceiling")]
    assert {name: statistics.median for name, statistics in found.items()} == {"ours": 4, "theirs": 5, "ceiling": 6}


def test_a_call_alone_is_timed_after_two_that_are_not():
    calls: list[tuple[str, int]] = []
    seconds = itertools.count(0, 0.25)
    timer = HostTimer(lambda: next(seconds))
    found = measure_single(timer, contenders(calls, "ours", "theirs"), 2)
    warm = [("ours", 0), ("ours", 1), ("theirs", 0), ("theirs", 1)]
    assert calls == [*warm, ("ours", 0), ("theirs", 0), ("ours", 1), ("theirs", 1)]
    assert found["ours"] == Statistics(250.0, (250.0, 250.0), 250.0, 2)


def test_bursts_are_on_one_input_set():
    calls: list[tuple[str, int]] = []
    seconds = itertools.count(0, 3)
    found = measure_single(HostTimer(lambda: next(seconds)), contenders(calls, "ours", "theirs"), 2, calls=3)
    assert calls[4:] == [(name, number) for number in (0, 1) for name in ("ours", "theirs") for _ in range(3)]
    assert found["ours"].median == 1000.0


def test_a_row_of_calls_goes_over_the_input_sets():
    calls: list[tuple[str, int]] = []
    seconds = itertools.count(0, 3)
    found = measure_back_to_back(
        HostTimer(lambda: next(seconds)), contenders(calls, "ours", "theirs"), 2, {"ours": 3, "theirs": 1}
    )
    assert calls == [*(("ours", n) for n in (0, 1, 2)), ("theirs", 0), *(("ours", n) for n in (1, 2, 3)), ("theirs", 1)]
    assert (found["ours"].median, found["theirs"].median) == (1000.0, 3000.0)


class Event:
    """Stands for torch.cuda.Event: how many events have been recorded is the time."""

    recorded = itertools.count()
    reached: ClassVar = [True, False, False, False]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = next(self.recorded)

    def query(self) -> bool:
        return self.reached.pop(0)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_the_host_gets_ahead_of_the_device(monkeypatch):
    slept: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(4, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer, calls = CudaTimer(), list[str]()
    assert timer.burst("ours", [lambda: calls.append("ours")]).device == 1
    assert (
        slept == [2_000_000, 4_000_000] and calls == ["ours"] * 2
    )  # the first time the device did not wait long enough
    timer.burst("theirs", [lambda: None])
    timer.burst("ours", [lambda: None] * 4)
    assert slept[2:] == [2_000_000, 4_000_000]  # and the next time it does
    assert timer.back_to_back([lambda: None] * 4).device == 0.25
    monkeypatch.setattr(Event, "reached", [True] * 4)
    assert timer.burst("synchronises", [lambda: None]).ahead is False


def test_the_floor_is_the_longer_of_arithmetic_and_memory():
    ceilings = Ceilings({"bf16": 800e12}, 4e12)
    assert ceilings.floor(8e12, 4e9, "bf16") == Floor(10.0, "arithmetic")
    assert ceilings.floor(8e9, 4e9, "bf16") == Floor(1.0, "memory")
    assert ceilings.floor(8e9, 4e9, "fp8") is None


def test_ratios_and_targets():
    found = ratios(3.0, {"Inductor": 2.0, "eager": 1.5, "nobody": 0.0})
    assert found == {"Inductor": 1.5, "eager": 2.0}
    assert verdict(Target(1.5, "Inductor"), found) == "target 1.5x Inductor: met"
    assert verdict(Target(1.51, "Inductor"), found) == "target 1.51x Inductor: MISSED"
    assert verdict(None, found) == verdict(Target(1.0, "nobody"), found) == ""


TIMES = Statistics(2.0, (1.9, 2.1), 0.25, 11)
FAST = Speed(
    "block", "qwen3", "forward", "ours BF16", TIMES, 1e12, Floor(1.5, "memory"), {"Inductor": 1.5},
    Target(1.4, "Inductor"), "a note",
)  # fmt: skip
ABSENT = Speed("block", "qwen3", "forward", "ours FP8", note="needs a Hopper GPU", target=Target(2.2, "Inductor"))
SMALL = Memory(
    "block", "qwen3", "forward+backward", "ours FP8, quantising", 5 * 2**30, 2 * 2**30, 2**30, 0, {"Inductor": 0.5},
    Target(1.0, "Inductor"),
)  # fmt: skip
KERNEL = Kernel("block", "qwen3", "forward", "ours BF16", "moecompile_combine", 1.0, 0.2, 0.1)


def test_rows_in_print(capsys):
    Results({}).add(FAST, ABSENT, SMALL, KERNEL)
    assert capsys.readouterr().out.splitlines() == [
        "  ours BF16                     2.0000 ms ±  5%     500 TFLOP/s   75% of floor 1.500 (memory)        "
        "host 0.250  1.50x Inductor  target 1.4x Inductor: met  a note",
        "  ours FP8                   needs a Hopper GPU",
        "  ours FP8, quantising       peak   5.00 GiB = gradients 2.00 + quantised weights 1.00 + 2.00  "
        "target 1x Inductor: MISSED",
        "       0.2000 ms 10.0%   1.0 x  moecompile_combine",
    ]


def test_rows_are_written_as_they_come(tmp_path, capsys):
    path = tmp_path / "rows.json"
    results = Results({"gpu": "a GPU"}, path)
    results.add(FAST, ABSENT)
    found = json.loads(path.read_text())
    assert found["machine"] == {"gpu": "a GPU"} and found["failures"] == []
    first, second = found["rows"]
    assert first["times"] == {"median": 2.0, "quartiles": [1.9, 2.1], "host": 0.25, "count": 11, "ahead": True}
    assert (first["teraflops"], first["share_of_floor"]) == (500.0, 0.75)
    assert first["verdict"] == "target 1.4x Inductor: met" and second["times"] is None and second["verdict"] == ""
    results.add(SMALL, KERNEL)
    results.fail("something", RuntimeError("it broke"))
    found = json.loads(path.read_text())
    assert [row["kind"] for row in found["rows"]] == ["speed", "speed", "memory", "kernel"]
    assert found["rows"][2]["over_gradients"] == 2 * 2**30
    assert found["failures"] == ["something: RuntimeError: it broke"]
    assert results.verdicts() == (1, 2)


def test_the_tables_fit_each_other():
    names = {shape.name for shape in BLOCKS} | {product.name for product in PRODUCTS}
    assert len(names) == len(BLOCKS) + len(PRODUCTS) and names.issuperset(bench_cases.QUICK)
    assert {shape.name for shape in BLOCKS}.issuperset(DECODE) and set(DECODE_TOKENS).issuperset(
        bench_cases.QUICK_TOKENS
    )
    decode = {f"{name} T{tokens}" for name in DECODE for tokens in DECODE_TOKENS}
    whats = {shape.name: {bench_cases.FORWARD, bench_cases.STEP} for shape in BLOCKS}
    whats |= {case: {bench_cases.GPU_TIME, bench_cases.CALLS} for case in decode}
    whats |= {product.name: {"BF16, bursts of 4", "FP8, bursts of 4"} for product in PRODUCTS}
    for name in MODELS:
        whats[name] |= {f"{what}, kernels of the experts" for what in (bench_cases.FORWARD, bench_cases.STEP)}
    assert set(MODELS) <= set(BUILDERS)
    assert all(what in whats[case] for case, what, _ in SPEED_TARGETS)
    assert {case for case, _, _ in SPEED_TARGETS} == set(whats)  # no case without a target
    assert BLOCKS[0].flops == 6 * 8192 * 8 * 7168 * 2048


def test_work_of_a_product():
    assert all(product.rows == 32768 for product in PRODUCTS if "32x256" not in product.name)
    plain, outer = PRODUCTS[0], PRODUCTS[5]
    assert plain.flops == 2 * 32768 * 4096 * 7168 == outer.flops
    assert plain.moved(1) == 32768 * 7168 + 8 * 4096 * 7168 + 2 * 32768 * 4096
    assert outer.moved(2) == 2 * (32768 * 4096 + 32768 * 7168 + 8 * 4096 * 7168)
