"""`fp8_compare`: what the table of FP8 against the model's own precision says, and that nothing else changes by it."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moecompile
from moecompile import comparison
from moecompile.comparison import ROWS, decibels, sampled
from moecompile.report import Compared, Report
from plain_layers import Plain
from test_fp8_models import MODELS, compiled, model_of
from test_linears import H
from tiny_transformers import known_to_transformers

ON = {"fp8_compare": "first_call"}


def found(report: Report | None = None) -> dict[str, Compared]:
    (graph,) = (report or moecompile.last_report()).graphs
    return {f"{each.module} {each.kind}": each for each in graph.compared}


def test_a_layer_by_itself_and_after_others() -> None:
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(40, H).bfloat16()
    with torch.no_grad():
        first = model.layers[0].get_submodule("up")
        ops, plain = torch.ops.moecompile, first(x)
        in_fp8 = ops.linear_fp8(x, first.weight, None, *ops.quantize(x), list(ops.quantize_weights(first.weight)))
        expected = 20 * math.log10(float(plain.double().norm() / (in_fp8.double() - plain.double()).norm()))
        compiled(model, **ON)(x)
    rows = found()
    assert len(rows) == 6 and all(each.kind == "linear" for each in rows.values())
    begin = rows["layers.0.up linear"]
    assert begin.alone == pytest.approx(expected, abs=1e-6) and begin.in_model == pytest.approx(expected, abs=1e-6)
    # two operands that are each off by 0.027 of their norm
    assert all(each.alone is not None and 27 < each.alone < 31 for each in rows.values())
    assert all(each.saturated == 0 and each.flushed is not None and each.flushed < 1e-3 for each in rows.values())
    end = rows["layers.2.down linear"]
    assert end.alone is not None and end.in_model is not None and end.in_model < end.alone - 1


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name: str) -> None:
    model, ids = model_of(name, layers=2)
    with torch.no_grad():
        compiled(model, **ON)(input_ids=ids)
    rows = found()
    choices = [each for each in rows.values() if each.kind == "choice of experts"]
    assert len(choices) == 2 and all(each.agreement is not None and each.agreement > 0.8 for each in choices)
    experts = [each for each in rows.values() if each.kind == "experts"]
    assert len(experts) == 2 and all(each.alone is not None and 20 < each.alone < 28 for each in experts)
    assert all(each.saturated == 0 and each.flushed is not None and each.flushed < 1e-3 for each in experts)
    table = moecompile.last_report().text(width=160)
    assert "FP8 against the model's own precision, one call" in table and "same experts" in table
    assert table.index("choice of experts") < table.index(" dB")


def test_with_float32_scales() -> None:
    model, ids = model_of("qwen3_moe", layers=1)
    tables = []
    for scale_format in ("power_of_two", "float32"):
        with torch.no_grad():
            compiled(copy.deepcopy(model), **ON, fp8_scale_format=scale_format)(input_ids=ids)
        tables.append(found())
    assert tables[0].keys() == tables[1].keys() and tables[0] != tables[1]
    assert all(each.alone is None or each.alone > 20 for each in tables[1].values())


def test_a_router_in_fp8_is_told_by_its_choices() -> None:
    model, _ = model_of("qwen3_moe", layers=1, experts=16)
    ids, agreement = torch.randint(0, 64, (8, 128)), {}
    for include in ((), ("*.gate",)):
        with torch.no_grad():
            compiled(copy.deepcopy(model), **ON, fp8_include=include, fp8_exclude=("*.self_attn",))(input_ids=ids)
        (choice,) = (each for each in found().values() if each.kind == "choice of experts")
        agreement[include] = choice.agreement
    assert agreement[()] == 1.0 and 0.9 < (agreement[("*.gate",)] or 0) < 1.0


def test_nothing_else_changes() -> None:
    class Stateful(Plain):
        """Counts its calls, writes into its rows, drops at random."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.get_buffer("calls").add_(1)
            x.mul_(2)
            return super().forward(nn.functional.dropout(x, 0.5))

    torch.manual_seed(0)
    model, x, outcomes = Stateful(), torch.randn(40, H).bfloat16(), list[Any]()
    for options in ({}, ON):
        mine, rows = copy.deepcopy(model), x.clone()
        torch.manual_seed(5)
        result, _ = compiled(mine, **options)(rows)
        result.float().sum().backward()
        outcomes.append(
            (
                result.detach(),
                rows,
                mine.get_buffer("calls"),
                torch.rand(3),
                mine.layers[0].get_submodule("up").weight.grad,
            )
        )
    assert all(map(torch.equal, *outcomes)) and outcomes[1][2] == 1
    assert len(found()) == 6
    (graph,) = moecompile.last_report().graphs
    assert "moecompile.linear_fp8" in graph.after and "observe" not in graph.after


def test_numbers_that_are_lost_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loud feature in a block takes what is quiet beside it; scales that are too small would cut numbers off."""
    model, x = Plain(), torch.ones(40, H).bfloat16()
    x[:, 0] = 2.0**18
    with torch.no_grad():
        compiled(model, **ON)(x)
    flushed = found()["layers.0.up linear"].flushed
    assert flushed == pytest.approx(127 * 40 / (256 * 40 + 256 * 256), rel=0.01)
    lost, values = comparison._Lost(), torch.tensor([[448.0, 448.0, 2.0, 0.0]]).to(torch.float8_e4m3fn)
    lost.add(torch.tensor([[1000.0, 448.0, 2.0, 1e-9]]), values, torch.ones(1, 1), (1, 128))
    assert (lost.count, lost.flushed, lost.saturated) == (4, 1, 1)
    for loud, cut_off in ((463.0, False), (465.0, True)):
        lost = comparison._Lost()
        lost.add(torch.full((1, 1), loud), torch.full((1, 1), loud).to(torch.float8_e4m3fn), torch.ones(1, 1), (1, 128))
        assert lost.saturated == cut_off


def test_under_autocast() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compiled(Plain().float(), **ON)(torch.randn(40, H))
    assert all(each.alone is not None and 27 < each.alone < 31 for each in found().values()) and len(found()) == 6


def test_layers_in_checkpointed_regions() -> None:
    class Checkpointed(Plain):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            inner = super().forward
            result: tuple[Tensor, Tensor] = checkpoint(inner, x, use_reentrant=False)
            return result

    compiled(Checkpointed(), **ON)(torch.randn(40, H).bfloat16())
    assert len([each for each in found().values() if each.alone is not None and each.in_model is not None]) == 6


def test_experts_of_every_layout() -> None:
    for name in (parameter.values[0] for parameter in known_to_transformers("gpt_oss", "mixtral")):
        model, ids = model_of(str(name), layers=1)
        with torch.no_grad():
            compiled(model, **ON)(input_ids=ids)
        (experts,) = (each for each in found().values() if each.kind == "experts")
        assert experts.alone is not None and 20 < experts.alone < 30, name


def test_what_fails_is_noted_and_the_model_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(comparison, "_linear_alone", broken)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "moecompile"):
        result, _ = compiled(Plain(), **ON)(torch.randn(8, H).bfloat16())
    assert result.isfinite().all() and not found()
    assert "not compared with its own precision: MemoryError: no room" in moecompile.last_report().graphs[0].notes
    assert "no room" in caplog.text


def test_without_fp8_it_is_refused() -> None:
    with pytest.raises(ValueError, match="`fp8_compare` is about FP8"):
        moecompile.Options(fp8_compare="first_call")


def test_samples_and_decibels() -> None:
    assert sampled(torch.arange(10.0).view(5, 2)).shape == (5, 2)
    assert sampled(torch.zeros(3, 100, 2)).shape == (150, 2) and sampled(torch.zeros(ROWS, 2)).shape == (ROWS, 2)
    one = torch.ones(4, 4)
    assert decibels(one * 1.1, one) == pytest.approx(20, abs=1e-5) and decibels(one, one) == math.inf
    assert math.isnan(decibels(one, one * 0)) and math.isnan(decibels(one * math.nan, one))
