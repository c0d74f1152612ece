"""The bench's blocks of transformers: what they are, that each is compiled by whom it says, and how times are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

import moecompile
from moecompile import bench_block, bench_model, bench_modules, bench_profile, bench_results
from moecompile.bench_block import Block
from moecompile.bench_cases import EAGER, FP8, FP8_EACH, IN_BENCH, IN_MODEL, INDUCTOR, OURS, TINY
from moecompile.bench_modules import Module
from moecompile.bench_proof import NotOursError
from moecompile.bench_results import Ceilings, Results, Setting
from moecompile.bench_timing import Contender, HostTimer
from moecompile.commands import main
from moecompile.runtime import reference

pytest.importorskip("transformers")

SHAPES = {name: replace(TINY, name=name, experts=8) for name in ("qwen3", "deepseek")}


@pytest.fixture
def setting() -> Setting:
    ceilings = Ceilings({"bf16": 700e12, "fp8": 1300e12}, 4e12)
    return Setting("cpu", HostTimer(), 2, ceilings, Results({}))


@pytest.fixture
def quickly(monkeypatch):
    """Inductor is left out: what moecompile rewrites runs operator by operator, the other is not compiled."""
    whole = torch.compile

    def compiled(module: Any, backend: str | None = None, options: Any = None, **others: Any) -> Callable[..., Tensor]:
        if backend is None:
            return module
        return whole(module, backend=backend, options={"lowering": "eager", **options}, **others)

    monkeypatch.setattr(torch, "compile", compiled)


@pytest.mark.parametrize("name", SHAPES)
def test_a_block_is_compiled_and_compared(name: str, setting: Setting, quickly, monkeypatch):
    ran: list[str] = []
    forward = reference.forward

    def noted(*args: Any, **options: Any) -> Any:
        ran.append("forward")
        return forward(*args, **options)

    monkeypatch.setattr(reference, "forward", noted)
    bench_model.measure_model(setting, SHAPES[name])
    assert setting.results.failures == [] and ran
    assert [len(graph.sites) for graph in moecompile.last_report().graphs] == 6 * [1]
    rows = [row for row in setting.results.rows if isinstance(row, bench_results.Speed)]
    assert [(row.what, row.contender) for row in rows] == [
        *(("forward, whole block", who) for who in (OURS, FP8, FP8_EACH, INDUCTOR, EAGER)),
        ("forward, kernels of the experts", IN_MODEL),
        *(("forward+backward, whole block", who) for who in (OURS, FP8, FP8_EACH, INDUCTOR, EAGER)),
        ("forward+backward, kernels of the experts", IN_MODEL),
    ]
    assert set(rows[0].ratios) == {INDUCTOR, EAGER} and rows[0].note == "emulated: no GPU"
    assert set(rows[1].ratios) == set(rows[2].ratios) == {INDUCTOR, EAGER}
    assert rows[5].note == "needs a Hopper GPU" and rows[5].times is None


@pytest.mark.parametrize("name", SHAPES)
def test_the_bench_calls_the_same_experts(name: str):
    block = Module.of(SHAPES[name], "cpu")
    held: Any = block.module.experts
    inputs = block.experts.inputs(0)
    assert held.config._experts_implementation == "grouped_mm"
    assert block.experts.w_in is held.gate_up_proj and block.experts.w_in.dtype == torch.bfloat16
    assert torch.equal(inputs.x, block.x[0]) and inputs.ids.shape == inputs.weights.shape == (48, 2)
    seen: list[Tensor] = []
    held.register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        block.module(block.x)
        found = bench_block.ours(block.experts)(inputs)
    assert float((found - seen[0]).norm() / seen[0].norm()) < 0.02


def test_a_block_that_is_not_rewritten_is_a_failure(setting: Setting, quickly, monkeypatch):
    monkeypatch.setenv("MOECOMPILE_DISABLE_PASSES", "detect,fuse")
    bench_model.measure_model(setting, SHAPES["qwen3"])
    words = "NotOursError: moecompile found no experts in the block"
    assert setting.results.failures == [
        f"model qwen3 {what}, {who}: {words}"
        for what in ("forward", "forward+backward")
        for who in (OURS, FP8, FP8_EACH)
    ]


def test_without_transformers_it_says_so(setting: Setting, monkeypatch, capsys):
    monkeypatch.setattr(bench_modules, "find_spec", lambda name: None)
    bench_model.measure_model(setting, SHAPES["qwen3"])
    assert "needs transformers" in capsys.readouterr().out and setting.results.failures == []


def test_the_kernels_in_the_model_and_in_the_bench(setting: Setting, monkeypatch):
    times = itertools.cycle([(6.0, 1.02), (6.0, 1.0)])  # in the model, in the bench
    monkeypatch.setattr(bench_model, "own_kernels", lambda setting, contender: next(times))
    monkeypatch.setattr(bench_model, "prove", lambda *args: None)
    shape = SHAPES["qwen3"]
    experts = Block.of(shape, 1, "cpu")
    block = Module(torch.nn.Identity(), torch.empty(0), torch.empty(0), experts)
    in_model = Contender(OURS, lambda _: None, 0.0)
    bench_model._measure_kernels(replace(setting, device="cuda"), block, in_model, "forward")
    model, bench = (row for row in setting.results.rows if isinstance(row, bench_results.Speed))
    assert (model.contender, bench.contender) == (IN_MODEL, IN_BENCH)
    assert model.ratios == {IN_BENCH: pytest.approx(1 / 1.02)} and model.flops == shape.flops
    assert model.verdict == "target 0.971x ours BF16, in the bench: met" and model.note == "6 kernels"


def test_only_our_kernels_are_added_up(setting: Setting, monkeypatch):
    class Profiled:
        def __init__(self, activities: Any) -> None:
            pass

        def __enter__(self) -> Profiled:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def key_averages(self) -> list[SimpleNamespace]:
            rows = [("moecompile_combine", 3, 300.0), ("moecompile_dispatch", dispatched, 600.0), ("fill", 3, 9000.0)]
            return [
                SimpleNamespace(key=key, count=count, self_device_time_total=time, device_type=DeviceType.CUDA)
                for key, count, time in rows[first:last]
            ]

    first, last, dispatched = 0, 3, 6
    monkeypatch.setattr(bench_profile, "profile", Profiled)
    contender = Contender(OURS, lambda _: None, 0.0)
    count, milliseconds = bench_profile.own_kernels(replace(setting, device="cuda"), contender)
    assert count == 3 and milliseconds == pytest.approx(0.3)
    dispatched = 4
    with pytest.raises(NotOursError, match=r"saw 2.33 of moecompile's kernels a call"):
        bench_profile.own_kernels(replace(setting, device="cuda"), contender)
    first = 2
    with pytest.raises(NotOursError, match="the profiler saw none"):
        bench_profile.own_kernels(replace(setting, device="cuda"), contender)


def test_the_command(capsys, quickly):
    assert main(["bench", "experts", "--device", "cpu", "--rounds", "1", "--only", "model"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model  tiny H64 I32 E4 top-2 T48  forward, whole block (Qwen3MoeSparseMoeBlock)" in lines
    assert lines[-1].startswith("0 of 0 targets met; 1 rounds, ") and ", model " in lines[-1]
