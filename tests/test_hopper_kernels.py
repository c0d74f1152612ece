"""What a call launches was said before, so that it is compiled together; nothing launches what was not said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fake_gpu
from fake_gpu import FakeGpu
from moecompile.runtime import hopper_kernels
from moecompile.runtime.contract import TENSORS
from remembered_calls import FORMS, call_of


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu.installed(monkeypatch) as installed:
        yield installed


def step(arguments: dict[str, Any], fp8: bool, train: bool) -> None:
    """One call of the operator and, in training, of its backward."""
    tensors = [arguments[name] for name in TENSORS]
    attributes = {name: value for name, value in arguments.items() if name not in TENSORS}
    if fp8:
        first = {"gate_up": arguments["gate_up"], "transposed": arguments.get("w_in_transposed", False)}
        with torch.no_grad():
            of_in = torch.ops.moecompile.quantize_weights(arguments["w_in"], arguments["w_up"], **first)
            of_out = torch.ops.moecompile.quantize_weights(
                arguments["w_out"], transposed=arguments.get("w_out_transposed", False)
            )
        attributes["quantized"] = [*of_in, *of_out]
    operator = torch.ops.moecompile.experts_fp8 if fp8 else torch.ops.moecompile.experts
    with torch.set_grad_enabled(train):
        result = operator(*tensors, **attributes)
    if train:
        given = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        torch.autograd.grad(result, given, torch.zeros_like(result))


@pytest.mark.parametrize("train", ["inference", "training", "recompute"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("hidden", "inner", "tokens"), [(64, 32, 3), (384, 272, 700)], ids=["small", "large"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_launched_was_said(
    form: str, hidden: int, inner: int, tokens: int, fp8: bool, train: str, gpu: FakeGpu
) -> None:
    arguments = call_of(form, hidden, inner, tokens)
    if train == "recompute":
        arguments["recompute"] = True
    if train != "inference":
        for tensor in arguments.values():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.requires_grad_()
    step(arguments, fp8, train != "inference")
    launched = {each.instance for each in gpu.taken() if "QuantizeWeights" not in repr(each.instance)}
    assert launched and launched <= gpu.announced, launched - gpu.announced
    assert len(gpu.announced - launched) <= 2, "compiled for nothing"


def test_those_of_one_block_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    monkeypatch.setattr(hopper_kernels.cubins, "build", built.append)
    hopper_kernels.compile_together.cache_clear()
    for _ in range(3):
        hopper_kernels.compile_together(("one", "two"))
    assert built == [("one", "two")]
    hopper_kernels.compile_together.cache_clear()
