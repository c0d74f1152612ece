"""The bench: what it times and in which order, what it compares, and what it says where it cannot run."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile import bench_baseline, bench_block, bench_cases, bench_experts, bench_gemm, bench_results
from moecompile.bench_block import Block, entrants, forward, recomputing, step
from moecompile.bench_cases import (
    ADDING,
    AGAIN,
    EAGER,
    FP8,
    FP8_AGAIN,
    FP8_EACH,
    FP8_TWICE,
    IN_FP8,
    INDUCTOR,
    OURS,
    STEP,
    TINY,
)
from moecompile.bench_results import Ceilings, Results, Setting
from moecompile.bench_timing import Absent, Contender, HostTimer
from moecompile.commands import main

CEILINGS = Ceilings({"bf16": 700e12, "fp8": 1300e12}, 4e12)


@pytest.fixture
def uncompiled(monkeypatch):
    """The baseline under Inductor is the eager one: what Inductor does is not at stake here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture
def fp8(monkeypatch):
    """FP8 operators that compute in BF16; returns the list of weights that were quantised."""
    made: list[Tensor] = []

    def quantize_weights(w: Tensor, w_up: Tensor | None = None, **_: Any):
        made.append(w)
        return tuple(torch.zeros(3, dtype=torch.uint8) for _ in range(4))

    def experts_fp8(*args: Any, quantized: list[Tensor], **attributes: Any) -> Tensor:
        assert len(quantized) == 8
        return torch.ops.moecompile.experts(*args, **attributes)

    monkeypatch.setattr(torch.ops.moecompile, "quantize_weights", quantize_weights)
    monkeypatch.setattr(torch.ops.moecompile, "experts_fp8", experts_fp8)
    return made


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting("cpu", HostTimer(), 2, CEILINGS, Results({}, tmp_path / "rows.json"))


def by_loop(x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    tokens = []
    for token, chosen, shares in zip(x, ids.tolist(), weights, strict=True):
        parts = []
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = (w_in[expert] @ token).chunk(2)
            parts.append(share * (w_out[expert] @ (gate * gate.sigmoid() * up)))
        tokens.append(torch.stack(parts).sum(0))
    return torch.stack(tokens)


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def test_baseline_and_ours_compute_the_same_experts():
    block = Block.of(TINY, 1, "cpu")
    inputs = block.inputs(0)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in block.leaves(inputs).items()}
    expected = by_loop(wide["x"], inputs.ids, wide["weights"], wide["w_in"], wide["w_out"])
    gradients = torch.autograd.grad(expected, list(wide.values()), inputs.cotangent.double())
    for run in (bench_block.ours(block), bench_block.baseline(block, compiled=False)):
        result = run(inputs)
        found = torch.autograd.grad(result, list(block.leaves(inputs).values()), inputs.cotangent)
        assert result.dtype == torch.bfloat16 and error(result, expected) < 0.01
        for mine, right in zip(found, gradients, strict=True):
            assert error(mine, right) < 0.02


def test_every_token_has_different_experts():
    inputs = bench_block.random_inputs(TINY, "cpu")
    assert all(len(set(chosen)) == TINY.top_k for chosen in inputs.ids.tolist())
    assert torch.allclose(inputs.weights.sum(1), torch.ones(TINY.tokens))


def test_a_step_begins_without_gradients():
    block = Block.of(TINY, 2, "cpu")
    contender = step(block, OURS, bench_block.ours(block))
    contender.call(0)
    once = block.w_in.grad
    assert once is not None
    contender.call(2)  # the first input set again
    assert block.w_in.grad is not None and torch.equal(block.w_in.grad, once)
    contender.call(1)
    assert block.inputs(0).x.grad is None and block.inputs(1).x.grad is not None


def test_bytes_that_must_be_moved():
    block = Block.of(TINY, 1, "cpu")
    experts = block.inputs(0).ids.unique().numel()
    weights, tokens = 3 * TINY.hidden * TINY.inner * experts, 2 * TINY.tokens * TINY.hidden
    assert block.moved(2, step=False) == 2 * tokens + 2 * weights
    assert block.moved(1, step=True) == 5 * tokens + (1 + 1 + 2) * weights


def test_a_block_and_decoding(setting: Setting, uncompiled):
    bench_experts.measure_block(replace(setting, profile=True), TINY)
    bench_experts.measure_decode(setting, TINY, [1, 4])
    rows = setting.results.as_dict()["rows"]
    assert setting.results.failures == []
    speeds = [row for row in rows if row["kind"] == "speed" and row["times"]]
    quantising = speeds.pop(0)
    assert quantising["contender"] == FP8 and quantising["note"] == "0.00 GiB in both orientations, emulated: no GPU"
    assert {(row["section"], row["what"]) for row in speeds} == {
        ("block", "forward"), ("block", "forward+backward"), ("block", ADDING),
        ("decode", "time on the GPU"), ("decode", "calls back to back"),
    }  # fmt: skip
    ours = next(row for row in speeds if row["contender"] == OURS)
    assert set(ours["ratios"]) == {INDUCTOR, EAGER} and ours["flops"] == 6 * 48 * 2 * 64 * 32
    for row in speeds:
        assert row["note"] == ("emulated: no GPU" if row["contender"] not in (INDUCTOR, EAGER) else "")
    fp8 = {(row["section"], row["what"]) for row in speeds if row["contender"] == FP8}
    assert fp8 == {(row["section"], row["what"]) for row in speeds}
    assert {row["what"] for row in speeds if row["contender"] == FP8_EACH} == {"forward", STEP}
    for name in (AGAIN, FP8_AGAIN):
        assert {row["what"] for row in speeds if row["contender"] == name} == {STEP}
    kernels = [row for row in rows if row["kind"] == "kernel" and row["contender"] == OURS]
    assert {row["what"] for row in kernels} == {"forward", STEP}
    assert [row["share"] for row in kernels if row["kernel"] == "all"] == [1.0, 1.0]


def test_fp8_columns(setting: Setting, uncompiled, fp8: list[Tensor]):
    bench_experts.measure_block(setting, TINY)
    rows = {(row.what, row.contender): row for row in setting.results.rows if isinstance(row, bench_results.Speed)}
    assert setting.results.failures == []
    quantising = rows["quantising the weights", FP8]
    assert quantising.times is not None and "GiB in both orientations" in quantising.note
    for name in (FP8, FP8_EACH):
        times = rows[STEP, name].times
        assert times is not None and times.count == setting.rounds
    before = len(fp8)
    block = Block.of(TINY, 1, "cpu")
    block.quantised = block.quantise()
    for name, count in ((FP8, 0), (FP8_EACH, 1)):
        fp8.clear()
        forward(block, name, bench_block.ours_fp8(block, each=name == FP8_EACH)).call(0)
        assert len(fp8) == 2 * count
    assert before > 4


def test_a_wrong_result_is_a_failure_and_the_others_are_measured(setting: Setting, uncompiled, monkeypatch):
    right = bench_block.ours
    monkeypatch.setattr(bench_block, "ours", lambda block, **how: lambda inputs: right(block, **how)(inputs) * 1.05)
    bench_experts.measure_block(setting, TINY)
    assert [failure.partition(" is ")[0] for failure in setting.results.failures] == [
        "tiny forward, ours BF16: WrongResultError: result",
        "tiny forward+backward, ours BF16: WrongResultError: x",
        "tiny forward+backward, ours BF16, recomputing: WrongResultError: x",
        "tiny forward+backward, main gradients, ours BF16: WrongResultError: x",
    ]
    measured = {row.contender for row in setting.results.rows if isinstance(row, bench_results.Speed) and row.times}
    assert measured == {INDUCTOR, EAGER, *IN_FP8} - {FP8_TWICE}, "of layers alone"


def test_peak_memory_has_gradients_and_copies_on_their_own(setting: Setting, monkeypatch, uncompiled, fp8, capsys):
    block = Block.of(TINY, 1, "cpu")
    block.quantised = list(torch.empty(8, 2**17, dtype=torch.uint8))
    gradients = bench_experts.size_of(block.leaves(block.inputs(0)).values())
    peaks = itertools.count(gradients + 2 * 2**20 + 1000, 2**20)
    for name, value in (
        ("synchronize", lambda: None),
        ("reset_peak_memory_stats", lambda: None),
        ("memory_allocated", lambda: 1000),
        ("max_memory_allocated", lambda: next(peaks)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    found = [step(block, *each) for each in (*entrants(block, quantising=True), *recomputing(block))]
    bench_experts._add_memory(setting.results, block, found)
    rows = {row.contender: row for row in setting.results.rows if isinstance(row, bench_results.Memory)}
    mib = {name: (row.over / 2**20, row.copies / 2**20, row.held / 2**20) for name, row in rows.items()}
    assert mib == {
        OURS: (2, 0, 0), INDUCTOR: (3, 0, 0), EAGER: (4, 0, 0), FP8: (5, 0, 1), FP8_EACH: (5.5, 0.5, 0),
        AGAIN: (7, 0, 0), FP8_AGAIN: (8, 0, 1),
    }  # fmt: skip
    assert all(row.gradients == gradients for row in rows.values())
    assert rows[OURS].ratios == {INDUCTOR: 1.5, EAGER: 2.0}
    assert ", beside quantised weights of 0.00 GiB" in capsys.readouterr().out


def test_products_are_compared_with_their_ceiling(setting: Setting):
    for product in bench_cases.TINY_PRODUCTS:
        for precision in bench_gemm.NAMES:
            bench_gemm.measure_product(setting, product, precision)
    rows = [row for row in setting.results.rows if isinstance(row, bench_results.Speed)]
    theirs = next(row for row in rows if row.contender == "torch" and row.times)
    assert set(theirs.ratios) == {"cuBLAS"} and theirs.flops == 2 * 128 * 64 * 128
    assert {row.note for row in rows if row.contender == OURS} == {"needs a Hopper GPU"}


def test_a_product_that_is_wrong_is_a_failure_and_a_rival_that_fails_is_none(setting: Setting):
    def fails(_: int) -> Tensor:
        raise RuntimeError("no such kernel")

    ones = Contender("torch", lambda _: torch.ones(4, 4), 1.0)
    twos = Contender(OURS, lambda _: torch.full((4, 4), 2.0), 1.0)
    assert bench_gemm._checked(setting, [twos, ones], "products") == [ones]
    assert setting.results.failures == [
        "products, ours BF16: WrongResultError: it is 1 away from PyTorch's, more than 0.02"
    ]
    found = bench_gemm._checked(setting, [twos, replace(ones, call=fails)], "products")
    assert found == [twos, Absent("torch", "does not run: no such kernel")]


def test_without_a_gpu_it_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "experts"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(
        "python -m moecompile bench: moecompile's kernels need a Hopper GPU (H100, H200), and"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert main(["bench", "experts"]) == 2
    assert "not NVIDIA A100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: what"),
        (["exports"], "invalid choice: 'exports'"),
        (["experts", "--shapes", "deepsek"], "--shapes: there is no deepsek; there are deepseek, qwen3,"),
        (["experts", "--only", "blocks"], "expected some of block,decode,gemm,model, got 'blocks'"),
        (["experts", "--rounds", "0"], "expected a positive number, got '0'"),
        (["experts", "--device", "cpu", "--json", "/no/such/folder/rows.json"], "cannot be written: No such file"),
    ],
)
def test_a_wrong_command_line(capsys, arguments: list[str], message: str):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command(capsys, tmp_path, uncompiled):
    path = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--rounds", "1", "--quick", "--only", "gemm,block", "--json", str(path)]
    assert main(["bench", "experts", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("moecompile 0.1.0  torch ") and "emulated in PyTorch" in lines[1]
    assert lines[2] == "ceilings"
    assert lines[-1].startswith("0 of 0 targets met; 1 rounds, ")
    found = json.loads(path.read_text())
    assert {row["section"] for row in found["rows"]} == {"ceiling", "gemm", "block"}


def test_a_failure_is_the_exit_status(capsys, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(bench_experts, "measure_block", fails)
    assert main(["bench", "experts", "--device", "cpu", "--rounds", "1", "--only", "block"]) == 1
    assert "  FAILED block tiny: RuntimeError: out of memory" in capsys.readouterr().out


def test_the_baseline_is_one_graph():
    block = Block.of(TINY, 1, "cpu")
    inputs = block.inputs(0)
    compiled = torch.compile(bench_baseline.experts, fullgraph=True, dynamic=False, backend="eager")
    given = inputs.x, inputs.ids, inputs.weights, block.w_in, block.w_out
    assert torch.equal(compiled(*given), bench_baseline.experts(*given))
