"""What a call launches was said before, so that it is compiled together; nothing launches what was not said."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fake_gpu
from fake_gpu import FakeGpu
from moecompile.codegen.gemms import GroupedGemm
from moecompile.codegen.instances import QuantizeWeights
from moecompile.codegen.nvrtc import CompileError
from moecompile.runtime import hopper_kernels, hopper_routing
from moecompile.runtime.contract import TENSORS
from remembered_calls import FORMS, call_of


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu.installed(monkeypatch) as installed:
        yield installed


def forward(arguments: dict[str, Any], fp8: bool, train: bool) -> torch.Tensor:
    """One call of the operator."""
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
        return operator(*tensors, **attributes)


def backward(arguments: dict[str, Any], result: torch.Tensor) -> None:
    tensors = [arguments[name] for name in TENSORS]
    given = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    torch.autograd.grad(result, given, torch.zeros_like(result))


def trained(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, all of which get gradients."""
    for tensor in arguments.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.requires_grad_()
    return arguments


def launched(gpu: FakeGpu) -> set[Any]:
    """The kernels that ran, but those that quantise the weights, which come before."""
    return {each.instance for each in gpu.taken() if not isinstance(each.instance, QuantizeWeights)}


def part_of(matrices: torch.Tensor) -> torch.Tensor:
    """The same matrices, each turned in memory, with a gap behind each line."""
    wide = torch.cat((matrices.mT, matrices.mT), 2).contiguous()
    return wide[:, :, : matrices.shape[1]].mT


@pytest.mark.parametrize("beside", [False, True], ids=["dispatched before", "dispatched beside"])
@pytest.mark.parametrize("way", ["inference", "training", "recompute"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("hidden", "inner", "tokens"), [(64, 32, 3), (384, 272, 700)], ids=["small", "large"])
@pytest.mark.parametrize("form", [*FORMS, "views"])
def test_what_is_launched_was_said(
    form: str,
    hidden: int,
    inner: int,
    tokens: int,
    fp8: bool,
    way: str,
    beside: bool,
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper_routing, "BESIDE", 0 if beside else 1 << 60)
    arguments = call_of("halves" if form == "views" else form, hidden, inner, tokens)
    if form == "views":
        arguments |= {name: part_of(arguments[name]) for name in ("w_in", "w_out")}
    if way == "recompute":
        arguments["recompute"] = True
    result = forward(arguments if way == "inference" else trained(arguments), fp8, way != "inference")
    said = frozenset(gpu.announced)
    if way != "inference":
        backward(arguments, result)
    ran = launched(gpu)
    assert ran and ran <= said, ran - said
    assert gpu.announced == said, "compiled in a second round"
    assert len(said - ran) <= 2, "compiled for nothing"


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_kernels_are_named_once_for_calls_alike(fp8: bool, gpu: FakeGpu) -> None:
    arguments = trained(call_of("halves", 64, 32))
    forward(arguments, fp8, train=True)
    assert gpu.announced
    gpu.announced.clear()
    forward(arguments, fp8, train=True)
    forward(trained(call_of("halves", 64, 32)), fp8, train=True)
    assert not gpu.announced
    forward(trained(call_of("single", 64, 32)), fp8, train=True)
    assert gpu.announced


def test_what_could_not_be_compiled_is_tried_again(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(instances: object) -> None:
        raise CompileError("a kernel")

    arguments = call_of("halves", 64, 32)
    with monkeypatch.context() as patched:
        patched.setattr(hopper_kernels.cubins, "build", fails)
        for _ in range(2):
            with pytest.raises(CompileError):
                forward(arguments, False, train=False)
    forward(arguments, False, train=False)
    assert launched(gpu) <= gpu.announced


EARLY = 5 * 128 + 2 * 8 + 6 * 4
"""Where `early` lies among a grouped GEMM's arguments (codegen/kernels/grouped_gemm.cuh)."""


@pytest.mark.parametrize("beside", [False, True], ids=["dispatched before", "dispatched beside"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_early_was_written_two_launches_before(
    form: str, fp8: bool, recompute: bool, beside: bool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between whoever writes offsets or matrices and a GEMM that reads them early lies a launch of the same call."""
    monkeypatch.setattr(hopper_routing, "BESIDE", 0 if beside else 1 << 60)
    arguments = trained(call_of(form, 384, 272, 700)) | {"recompute": recompute}
    result = forward(arguments, fp8, train=True)
    calls = [gpu.taken()]
    backward(arguments, result)
    calls.append(gpu.taken())
    for launches in calls:
        first = next(i for i, each in enumerate(launches) if not isinstance(each.instance, QuantizeWeights))
        early = [
            i
            for i, each in enumerate(launches)
            if isinstance(each.instance, GroupedGemm) and struct.unpack_from("i", each.arguments, EARLY) == (1,)
        ]
        assert early
        for i in early:  # where rows are dispatched beside, PyTorch has cleared their counters
            instance = launches[i].instance
            assert i > first or (isinstance(instance, GroupedGemm) and instance.dispatches)
