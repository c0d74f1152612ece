"""The bench's proof that what it reports as ours was computed by moecompile's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fake_gpu import FakeGpu, installed
from moecompile import bench_block
from moecompile.bench_block import Block, forward, step
from moecompile.bench_cases import EAGER, FORWARD, FP8, FP8_EACH, INDUCTOR, OURS, STEP, TINY
from moecompile.bench_proof import FORWARD_KERNELS, PREFIX, NotOursError, kernels_of, launched, prove, require
from moecompile.bench_timing import Contender
from moecompile.codegen import instances
from moecompile.codegen.gemms import Activated, ActivationBackward, GroupedGemm, Plain, Turned
from moecompile.codegen.instances import Plan
from moecompile.runtime import hopper_experts, launch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with installed(monkeypatch) as found:
        yield found


def test_kernels_of_each_call(gpu: FakeGpu):
    block = Block.of(TINY, 2, "cpu")
    contender = forward(block, OURS, bench_block.ours(block))
    prove(contender, range(2), "cuda")
    before = launch._driver
    with launched() as names:
        contender.call(0)  # like one before: what is remembered launches, too
    assert launch._driver is before
    expected = [f"{PREFIX}{kernel}" for kernel in FORWARD_KERNELS[OURS]]
    assert names == [*expected[:1], f"{PREFIX}dispatch", *expected[1:]]


def test_a_step_needs_the_kernels_of_the_backward(gpu: FakeGpu):
    block = Block.of(TINY, 1, "cpu")
    contender = step(block, OURS, bench_block.ours(block))
    with torch.no_grad(), launched() as names:
        bench_block.ours(block)(block.inputs(0))
    with pytest.raises(NotOursError, match="no grouped_gemm_activation_backward, grouped_gemm_over_rows; of ours"):
        require(contender, names)


def test_a_fallback_is_an_error(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    block = Block.of(TINY, 1, "cpu")
    monkeypatch.setattr(hopper_experts, "takes", lambda args: False)
    contender = forward(block, OURS, bench_block.ours(block))
    with pytest.raises(
        NotOursError, match=r"did not run: no grouped_gemm_activated, .*; of ours there ran moecompile_plan"
    ):
        prove(contender, range(1), "cuda")
    prove(contender, range(1), "cpu")  # where nothing is proven
    with pytest.raises(NotOursError, match=r"did not run: no quantize_weights, .*; of ours there ran none"):
        require(replace(contender, kernels=kernels_of(FP8_EACH, FORWARD)), [])


def test_a_launch_that_fails_has_not_run(gpu: FakeGpu):
    block = Block.of(TINY, 1, "cpu")
    gpu.status = 700
    with launched() as names, pytest.raises(launch.DriverError):
        forward(block, OURS, bench_block.ours(block)).call(0)
    assert names == []


def test_others_must_not_run_them(gpu: FakeGpu):
    block = Block.of(TINY, 1, "cpu")
    assert kernels_of(INDUCTOR, STEP) == kernels_of(EAGER, FORWARD) == ()
    prove(Contender(EAGER, lambda _: None, 1.0), range(1), "cuda")
    with pytest.raises(NotOursError, match="ran in its place: moecompile_plan_place, moecompile_dispatch"):
        prove(forward(block, INDUCTOR, bench_block.ours(block)), range(1), "cuda")


def test_they_are_the_names_of_kernels():
    activation = "mul(silu(gate), up)"
    gemms = [
        GroupedGemm("bfloat16", 256, 4, 2, over_rows=over_rows, epilogue=epilogue)
        for over_rows in (False, True)
        for epilogue in (
            Plain(),
            Turned(),
            Activated(activation, "halves"),
            ActivationBackward(activation, "halves", True),
        )
    ]
    names = {gemm.name for gemm in gemms} | {Plan("place", "int64", 512).name}
    names |= {
        kind.name
        for kind in (
            instances.Combine,
            instances.Dispatch,
            instances.QuantizeRows,
            instances.QuantizeWeights,
            instances.TransposeRows,
        )
    }
    wanted = {kernel for name in (OURS, FP8, FP8_EACH) for what in (FORWARD, STEP) for kernel in kernels_of(name, what)}
    assert {PREFIX + kernel for kernel in wanted} <= names
