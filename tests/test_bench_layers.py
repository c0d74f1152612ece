"""The bench's whole layers: what they are, that each is compiled by whom it says, and how kernels are told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moecompile
from moecompile import bench_layers, bench_stacks
from moecompile.bench_cases import CASTS, FP8, FP8_EACH, FP8_TWICE, INDUCTOR, LAYER_TARGETS, OURS, STEP, TINY
from moecompile.bench_results import Ceilings, Kernel, Memory, Results, Setting
from moecompile.bench_stacks import Stack
from moecompile.bench_timing import HostTimer
from moecompile.commands import main
from moecompile.passes.casts import Cast

pytest.importorskip("transformers")


@pytest.fixture
def setting(tmp_path) -> Setting:
    ceilings = Ceilings({"bf16": 700e12, "fp8": 1300e12}, 4e12)
    return Setting("cpu", HostTimer(), 2, ceilings, Results({}, tmp_path / "rows.json"))


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor is left out: what moecompile rewrites runs operator by operator, the other is not compiled."""
    whole = torch.compile

    def compiled(module: Any, backend: str | None = None, options: Any = None, **others: Any) -> Callable[..., Tensor]:
        if backend is None:
            return module
        chosen = {name: value for name, value in options.items() if name != "inductor"}
        return whole(module, backend=backend, options={"lowering": "eager", **chosen}, **others)

    monkeypatch.setattr(torch, "compile", compiled)


def test_layers_are_compiled_and_compared(setting: Setting, quickly: None, capsys: pytest.CaptureFixture[str]) -> None:
    bench_layers.measure_layers(setting, TINY, 1, 24)
    assert not setting.results.failures
    rows = json.loads((setting.results.path).read_text())["rows"] if setting.results.path else []
    speeds = [(row["what"], row["contender"]) for row in rows if row["kind"] == "speed"]
    names = (INDUCTOR, OURS, FP8, FP8_EACH)
    assert speeds == [
        (what, name) for what, more in (("forward", ()), (STEP, (FP8_TWICE,))) for name in (*names, *more)
    ]
    kinds = [row["kernel"] for row in rows if row["kind"] == "kernel" and row["contender"] == FP8_EACH]
    assert kinds == [*(kind for kind, _ in bench_layers.KINDS), bench_layers.REST]
    printed = capsys.readouterr().out
    assert "T48, 1 layer, sequences of 24  forward\n" in printed and "target" not in printed
    casts = moecompile.last_report().casts
    assert len([row for row in casts if row.kind == "experts" and row.cast]) == 1


@pytest.mark.slow
def test_forward_and_step_do_not_share_what_dynamo_allows_a_function(setting: Setting, quickly: None) -> None:
    with torch._dynamo.config.patch(recompile_limit=5):
        bench_layers.measure_layers(setting, TINY, 1, 48)
    assert not setting.results.failures


def test_kernels_of_a_step_are_listed(setting: Setting, quickly: None, capsys: pytest.CaptureFixture[str]) -> None:
    bench_layers.measure_layers(replace(setting, profile=True), TINY, 1, 48)
    listed = capsys.readouterr().out.partition("where the step of ours FP8, quantising goes")[2]
    assert "moecompile::experts_fp8" in listed and "others\n" in listed and listed.rstrip().endswith("  all")


@pytest.mark.slow
def test_layers_that_are_not_rewritten_are_a_failure(setting: Setting, quickly: None, monkeypatch) -> None:
    monkeypatch.setitem(bench_layers.OPTIONS, OURS, {"disable": ("detect",)})
    bench_layers.measure_layers(setting, TINY, 1, 48)
    assert any("ours BF16: NotOursError: moecompile found no experts" in words for words in setting.results.failures)


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_what_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_stacks,
        "ATTENTION",
        bench_stacks.Attention(
            {
                "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
                "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
            },
            bench_stacks.TINY,
        ),
    )  # fmt: skip
    stack = Stack.of(replace(TINY, name=name, experts=8), 2, 12, "cpu")
    assert stack.x.shape == (4, 12, TINY.hidden) and stack.case == f"{name} x2 S12"
    stack.module(stack.x).backward(stack.cotangent)
    gradients = stack.gradients()
    assert "x" in gradients and sum("experts.gate_up_proj" in each for each in gradients) == 2
    assert all(each.dtype == torch.bfloat16 for each in stack.module.parameters())
    stack.forget_gradients()
    assert not stack.gradients()
    assert {(name, "forward", FP8), (name, "forward+backward", FP8_EACH)} <= LAYER_TARGETS.keys()


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("moecompile_gemm", "products"),
        ("moecompile_grouped_gemm_over_rows", "products"),
        ("nvjet_sm90_qqtst_128x128_128x6_2x1_v_bz_coopA_algo2_Ablk128_Bvec128_TNN", "products"),
        ("moecompile_quantize_weights", "quantising the weights"),
        ("moecompile_quantize_gradient", CASTS),
        ("moecompile_transpose_rows", CASTS),
        ("triton_per_fused__to_copy_along_tokens_mul_scaled_mm_7", bench_layers.REST),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("moecompile_combine", bench_layers.REST),
        ("triton_poi_fused_add_cat_mul_neg_slice_zeros_like_10", bench_layers.REST),
    ],
)
def test_what_kernels_are_for(kernel: str, kind: str) -> None:
    assert bench_layers.kind_of(kernel) == kind


def test_bytes_of_copies() -> None:
    stack = Stack.of(TINY, 1, 48, "cpu")
    path = "model.layers.0"
    rows = [
        Cast(f"{path}.self_attn.q_proj", "linear", (64, 64), True, ""),
        Cast(f"{path}.mlp.experts", "experts", (4, 64, 64), True, ""),
        Cast(f"{path}.mlp.gate", "linear", (4, 64), False, ""),
    ]
    assert bench_layers.copied(stack.module, rows) == 128 * 128 + 4 * (128 * 128 + 128 * 128)


def test_shares_and_what_is_held_in_print() -> None:
    row = ("model", "tiny x1", "forward+backward", FP8_EACH, CASTS, 20.0, 0.7)
    assert Kernel(*row, 0.072, most=0.08).verdict == "target at most 8%: met"
    assert Kernel(*row, 0.1, most=0.08).line().endswith("casts of rows and gradients  target at most 8%: MISSED")
    held = Memory("model", "tiny x1", "held", FP8_EACH, 3 * 2**30, 0, 2**30, label="held")
    assert "held   3.00 GiB = quantised weights 1.00 + 2.00" in held.line()
    results = Results({})
    results.add(Kernel(*row, 0.1, most=0.08), Kernel(*row, 0.01, most=0.08), Kernel(*row, 0.1))
    assert results.verdicts() == (1, 2)


def test_the_command(capsys: pytest.CaptureFixture[str], quickly: None) -> None:
    assert main(["bench", "model", "--device", "cpu", "--rounds", "1", "--layers", "1", "--sequence", "16"]) == 0
    assert "T48, 1 layer, sequences of 16  forward\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "model", "--device", "cpu", "--layers", "none"])
    assert "expected a positive number, got 'none'" in capsys.readouterr().err
