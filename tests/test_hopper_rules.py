"""What the kernels do not take runs in PyTorch's operators, and the log says which rule it broke, once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fake_gpu
from fake_gpu import FakeGpu
from moecompile.runtime.contract import TENSORS
from moecompile.runtime.once import warn_once
from remembered_calls import call_of

HIDDEN, INNER, TOKENS = 64, 32, 3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    warn_once.cache_clear()
    with fake_gpu.installed(monkeypatch) as installed:
        yield installed


def run(arguments: dict[str, Any], fp8: bool) -> None:
    """A call without gradients."""
    tensors = [arguments[name] for name in TENSORS]
    attributes = {name: value for name, value in arguments.items() if name not in TENSORS}
    if fp8:
        gate_up, transposed = arguments["gate_up"], arguments.get("w_in_transposed", False)
        of_in = torch.ops.moecompile.quantize_weights(
            arguments["w_in"], arguments["w_up"], gate_up=gate_up, transposed=transposed
        )
        of_out = torch.ops.moecompile.quantize_weights(arguments["w_out"])
        torch.ops.moecompile.experts_fp8(*tensors, **attributes, quantized=[*of_in, *of_out])
    else:
        torch.ops.moecompile.experts(*tensors, **attributes)


def strided(name: str, form: str = "biased") -> dict[str, Any]:
    """The argument of that name with gaps between its elements."""
    arguments = call_of(form, HIDDEN, INNER)
    wide = arguments[name].repeat_interleave(2, -1)
    return arguments | {name: wide[..., ::2]}


def shifted(name: str) -> dict[str, Any]:
    """The argument of that name, one element behind where memory begins."""
    arguments = call_of("biased", HIDDEN, INNER)
    like = arguments[name]
    return arguments | {name: like.new_zeros(like.numel() + 1)[1:].view(like.shape)}


def with_dtype(dtype: torch.dtype) -> dict[str, Any]:
    arguments = call_of("halves", HIDDEN, INNER)
    cast = {name: arguments[name].to(dtype) for name in ("x", "w_in", "w_out")}
    return arguments | cast | {"output": "mul(out, cast(weight, float16))" if dtype == torch.float16 else "out"}


def one_bias() -> dict[str, Any]:
    return call_of("separate", HIDDEN, INNER) | {"b_up": None}


FP8 = "experts in FP8 are emulated with PyTorch's operators, which is slow: "
SIXTEEN = "experts run PyTorch's operators: "
REFUSED: dict[str, tuple[bool, dict[str, Any]]] = {
    "experts get mul(x, cast(weight, bfloat16)), not x itself": (
        False,
        call_of("no weights", HIDDEN, INNER)
        | {"input": "mul(x, cast(weight, bfloat16))", "weights": torch.zeros(TOKENS, 2), "output": "out"},
    ),
    "relu(mul(out, cast(weight, bfloat16))) is no product of out and the weight": (
        False,
        call_of("halves", HIDDEN, INNER) | {"output": "relu(mul(out, cast(weight, bfloat16)))"},
    ),
    "offsets and order are not contiguous": (False, strided("offsets")),
    "one of gate and up projection has a bias, the other has none": (False, one_bias()),
    "x, the weights, the biases and all between are not of one dtype, bfloat16 or float16": (
        False,
        with_dtype(torch.float32),
    ),
    "hidden, intermediate and output size 64, 36 and 64 are not all multiples of 8": (
        False,
        call_of("halves", HIDDEN, 36),
    ),
    "rows of the weights do not begin at multiples of 16 bytes": (False, shifted("w_out")),
    "biases are not contiguous, or do not begin at a multiple of 4 bytes": (False, strided("b_out")),
    "the model is in torch.float16; its experts have kernels for bfloat16": (True, with_dtype(torch.float16)),
    "hidden, intermediate and output size 64, 40 and 64 are not all multiples of 16": (
        True,
        call_of("halves", HIDDEN, 40),
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_is_said_once(reason: str, gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    fp8, arguments = REFUSED[reason]
    with caplog.at_level(logging.INFO, logger="moecompile"):
        for _ in range(3):
            gpu.taken()
            run(arguments, fp8)
            launched = [each.instance.name for each in gpu.taken()]
            assert not any("Dispatch" in name or "Activated" in name for name in launched)
    assert caplog.messages == [(FP8 if fp8 else SIXTEEN) + reason]


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_nothing_is_said_of_what_the_user_chose_or_where_nobody_is_routed(
    fp8: bool, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="moecompile"):
        run(call_of("halves", HIDDEN, INNER), fp8)
        run(call_of("halves", HIDDEN, 36) | {"kernels": "reference"}, fp8)
        run(call_of("halves", HIDDEN, 36, tokens=0), fp8)
    assert not caplog.messages
