"""Rows that travel in FP8: lines hold what `quantize` gives, and experts that are given lines compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dense_experts import SWIGLU, make_case, routing
from moecompile.runtime.quantize import ALONG_FEATURES, POWER_OF_TWO, SCALE_FORMATS, quantize
from test_experts_fp8 import BIASES, quantized

ops = torch.ops.moecompile
SIZES = (208, 96, 144)
"""Features, inner size, features of results: parts of scale blocks."""
NEEDS = [True, True, True, True, False]


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize(("rows", "features"), [(5, 128), (7, 208), (1, 16), (0, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lines_hold_values_and_scales(rows: int, features: int, scale_format: str, dtype: torch.dtype) -> None:
    x = torch.randn(rows, features).to(dtype)
    x[:1, :2] = torch.tensor([float("nan"), float("inf")])
    lines = ops.to_lines(x, scale_format=scale_format)
    assert lines.dtype == torch.bfloat16 and lines.shape[1] * 2 % 16 == 0 and lines.is_contiguous()
    values, scales = ops.from_lines(lines, features=features)
    right = quantize(x, ALONG_FEATURES, scale_format)
    assert torch.equal(values.view(torch.uint8), right[0].view(torch.uint8)) and values.is_contiguous()
    assert torch.equal(scales.view(torch.int32), right[1].contiguous().view(torch.int32)) and scales.is_contiguous()


@pytest.mark.parametrize("operator", [ops.to_lines, ops.from_lines], ids=str)
def test_operators_are_well_defined(operator: Any) -> None:
    x = torch.randn(6, 208).bfloat16()
    args, kwargs = ((x,), {}) if operator is ops.to_lines else ((ops.to_lines(x),), {"features": 208})
    torch.library.opcheck(operator, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.to_lines(torch.ones(3, 24).bfloat16()), ValueError, r"a multiple of 16 features\), got \(3, 24\)"),
        (lambda: ops.to_lines(torch.ones(3, 32)), TypeError, "bfloat16 or float16, got torch.float32"),
        (
            lambda: ops.from_lines(torch.ones(3, 32).bfloat16(), features=32),
            ValueError,
            r"lines of 32 features, \(rows, 24\), got \(3, 32\)",
        ),
        (lambda: ops.from_lines(torch.ones(3, 24), features=32), TypeError, "bfloat16, as to_lines gives them"),
        (lambda: ops.from_lines(torch.ones(3, 24), features=30), ValueError, "a multiple of 16 features, got 30"),
    ],
)
def test_what_are_no_lines(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("gate_up", ["halves", "interleaved", "separate"])
def test_experts_given_lines_compute_the_same(gate_up: str, scale_format: str, recompute: bool) -> None:
    """Forward, what is saved, and all gradients, to the bit."""
    torch.manual_seed(0)
    ids = routing("dropped", 40, 2, 3)
    case = make_case(ids, 3, SWIGLU, gate_up, (False, False), (), torch.bfloat16, torch.float32, SIZES)
    x, *rest = case.arguments()
    given: Any = {**case.attributes, "scale_format": scale_format, "recompute": recompute, "quantized": quantized(case)}
    how = {} if scale_format == POWER_OF_TWO else {"scale_format": scale_format}
    with torch.no_grad():
        out, saved = ops.experts_fp8_forward(x, *rest, **given)
        again, kept = ops.experts_fp8_forward(ops.to_lines(x, **how), *rest, **given, lines=True)
        assert same([out, *saved], [again, *kept])
        grad = torch.randn_like(out).bfloat16()
        needs = [*NEEDS[:4], gate_up == "separate", False, False, False]
        right = ops.experts_fp8_backward(grad, saved, *rest, **given, needs=needs)
        found = ops.experts_fp8_backward(ops.to_lines(grad, **how), kept, *rest, **given, needs=needs, lines=True)
        assert same(found, right) and all(bool(each.any()) for each in right)


def same(found: list[Tensor], right: list[Tensor]) -> bool:
    """To the bit."""
    pairs = [(one.contiguous(), other.contiguous()) for one, other in zip(found, right, strict=True)]
    return all(
        one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        for one, other in pairs
        if one.numel()
    )


def test_gradients_of_biases_want_more_than_lines() -> None:
    torch.manual_seed(0)
    ids = routing("dropped", 40, 2, 3)
    case = make_case(ids, 3, SWIGLU, "halves", (False, False), BIASES, torch.bfloat16, torch.float32, SIZES)
    x, *rest = case.arguments()
    given: Any = {**case.attributes, "quantized": quantized(case)}
    with torch.no_grad():
        out, saved = ops.experts_fp8_forward(x, *rest, **given)
        lines = ops.to_lines(out.bfloat16())
        with pytest.raises(ValueError, match="that of b_out is a sum of what it was before"):
            ops.experts_fp8_backward(lines, saved, *rest, **given, needs=[True] + [False] * 7, lines=True)
        with pytest.raises(ValueError, match=r"x must be lines of 208 features, \(rows, 112\), got \(40, 208\)"):
            ops.experts_fp8_forward(x, *rest, **given, lines=True)
