"""Training steps like one before launch what a first one launches, forward and backward."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fake_gpu
from fake_gpu import FakeGpu, Launched
from moecompile.runtime import hopper_experts, hopper_routing, remembered
from moecompile.runtime.contract import TENSORS, Arguments
from moecompile.runtime.recording import Recorder
from moecompile.runtime.remembered import CALLS, Memory
from remembered_calls import FORMS, call_of, noting_checks

ops = torch.ops.moecompile
COTANGENTS = {dtype: torch.zeros(5, 144, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu.installed(monkeypatch) as installed:
        yield installed


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Arguments]:
    return noting_checks(monkeypatch)


def call(form: str, fp8: bool, **changes: Any) -> dict[str, Any]:
    """Arguments by name, of which those that can have gradients get them."""
    arguments = call_of(form, 144, 80, 5) | changes
    if fp8:
        first = {"gate_up": arguments["gate_up"], "transposed": arguments.get("w_in_transposed", False)}
        second = arguments.get("w_out_transposed", False)
        with torch.no_grad():
            of_in = ops.quantize_weights(arguments["w_in"], arguments["w_up"], **first)
            # they lie where the next call would put its own
            of_out = ops.quantize_weights(arguments["w_out"], transposed=second)
            arguments["quantized"] = [tensor.clone() for tensor in (*of_in, *of_out)]
    for tensor in arguments.values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.requires_grad_()
    return arguments


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    return [each for each in arguments.values() if isinstance(each, Tensor) and each.requires_grad]


def step(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    attributes = {name: value for name, value in arguments.items() if name not in TENSORS}
    operator = ops.experts_fp8 if "quantized" in arguments else ops.experts
    result = operator(*(arguments[name] for name in TENSORS), **attributes)
    return torch.autograd.grad(result, leaves(arguments), COTANGENTS[result.dtype])


def launched(gpu: FakeGpu, arguments: dict[str, Any]) -> list[Launched]:
    """What a step launches."""
    gpu.taken()
    for gradient, leaf in zip(step(arguments), leaves(arguments), strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype and gradient.stride() == leaf.stride()
    return gpu.taken()


def instances(launches: list[Launched]) -> list[Any]:
    return [each.instance for each in launches]


@pytest.mark.parametrize("beside", [False, True], ids=["dispatched before", "dispatched beside"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_launches(
    form: str, fp8: bool, recompute: bool, beside: bool, gpu: FakeGpu, checks: list[Arguments], monkeypatch: Any
) -> None:
    monkeypatch.setattr(hopper_routing, "BESIDE", 0 if beside else 1 << 60)
    first, again = (call(form, fp8, recompute=recompute) for _ in range(2))
    launched(gpu, first)
    assert len(CALLS) == 2
    checks.clear()
    found = launched(gpu, again)
    assert len(CALLS) == 2 and not checks, "the second step was taken for a new one"
    CALLS.clear()
    expected = launched(gpu, again)
    assert len(found) == len(expected) > 6
    for one, other in zip(found, expected, strict=True):
        assert one == other, one.instance


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_large_rows_that_come_piece_by_piece(fp8: bool, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_experts, "LARGE", 1)
    monkeypatch.setattr(hopper_experts, "COLUMNS", 24)
    first, again = call("halves", fp8), call("halves", fp8)
    launched(gpu, first)
    found = launched(gpu, again)
    CALLS.clear()
    assert found == launched(gpu, again)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("frozen", [("w_in", "w_out"), ("x",), ("weights",), ("x", "weights", "w_out")])
def test_other_gradients_are_another_call(frozen: tuple[str, ...], fp8: bool, gpu: FakeGpu) -> None:
    launched(gpu, call("halves", fp8))
    arguments = call("halves", fp8)
    for name in frozen:
        arguments[name].requires_grad_(False)
    found = launched(gpu, arguments)
    CALLS.clear()
    assert found == launched(gpu, arguments)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_gradients_that_lie_otherwise(fp8: bool, gpu: FakeGpu) -> None:
    """The result's gradient may be expanded, strided or of another dtype: that is another call."""

    def backward(like: Tensor) -> list[Launched]:
        arguments = call("float32 result", fp8)
        attributes = {name: value for name, value in arguments.items() if name not in TENSORS}
        result = (ops.experts_fp8 if fp8 else ops.experts)(*(arguments[name] for name in TENSORS), **attributes)
        gpu.taken()
        torch.autograd.grad(result, leaves(arguments), like)
        return gpu.taken()

    likes = (torch.zeros(5, 144), torch.zeros(1, 1).expand(5, 144), torch.zeros(144, 5).t())
    found = [instances(backward(like)) for like in (*likes, *likes)]
    assert all(each == found[0] for each in found)
    assert len(CALLS) == 1 + len(likes)


def test_memory_is_let_go_where_it_was(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remembered step holds no more at once than a first one."""
    peaks = []
    arguments = call("halves", True)
    launch_on = fake_gpu.FakeGpu.cuLaunchKernelEx

    def held() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    counts: list[int] = []

    def counting(self: FakeGpu, *others: Any) -> Any:
        counts.append(held())
        return launch_on(self, *others)

    monkeypatch.setattr(fake_gpu.FakeGpu, "cuLaunchKernelEx", counting)
    gc.collect()
    gc.freeze()  # what other tests have left is many times as much, and need not be looked through
    try:
        for _ in range(3):
            counts.clear()
            step(arguments)
            peaks.append(max(counts))
    finally:
        gc.unfreeze()
    assert peaks[2] <= peaks[1] <= peaks[0]


def test_what_cannot_be_repeated_is_not_remembered_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Not an error: the call has its results."""
    memory, elsewhere = Memory(), torch.ones(3)

    def stranger() -> list[Tensor]:
        return [x + elsewhere]

    def asking() -> list[Tensor]:
        return [x + 1 if x.sum().item() else x - 1]

    x = torch.ones(3)
    with caplog.at_level(logging.WARNING, "moecompile"):
        for run, why in ((stranger, "is none of the call's"), (asking, "_local_scalar_dense.default tells the host")):
            for _ in range(4):
                assert memory.again(run.__name__, (x,), {}) is None
                assert torch.equal(memory.first(run.__name__, (x,), {}, run)[0], torch.full((3,), 2.0))
            assert caplog.text.count(why) == 1
    assert not len(memory)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.new_zeros(x.nonzero().shape[0]),
        lambda x: x[x > 0],
        lambda x: x.new_zeros(int(x.sum())),
        lambda x: torch.masked_select(x, x > 0),
    ],
)
def test_what_depends_on_values_is_refused(run: Any) -> None:
    x = torch.ones(3)
    with Recorder((x,)) as recorder:
        made = run(x)
    assert recorder.program([made]) is None and recorder.refused


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.index_select(0, x.argsort()),
        lambda x: x[x.argsort()],
        lambda x: x.new_empty(()).fill_(2),
        lambda x: torch.empty_like(x.view(1, 3)[:, :2]).copy_(x[:2]),
        lambda x: x.new_empty(0, 5),
    ],
)
def test_what_follows_from_shapes_is_repeated(run: Any) -> None:
    x, other = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([4.0, 6.0, 5.0])
    with Recorder((x,)) as recorder:
        made = run(x)
    program = recorder.program([made])
    assert program is not None, recorder.refused
    (found,), expected = program.run((other,)), run(other)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


def test_a_call_is_recorded_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that never come again do not drive out those that do."""
    monkeypatch.setattr(remembered, "ENTRIES", 4)
    memory, x = Memory(), torch.ones(3)

    def called(count: int) -> Tensor:
        given = torch.ones(count)
        known = memory.again("some", (given,), {})
        return (memory.first("some", (given,), {}, lambda: [given + 1]) if known is None else known)[0]

    for _ in range(3):
        assert len(memory) == 0 or len(memory) == 1
        assert torch.equal(called(3), x + 1)
    assert len(memory) == 1
    for count in range(10, 40):
        called(count)
    assert len(memory) == 1 and memory.again("some", (x,), {}) is not None


def test_a_program_of_operators_alone() -> None:
    """Views, operators in place, those with lists of tensors, and results that are arguments or views."""

    def compute(x: Tensor, y: Tensor) -> list[Tensor]:
        first, second = x.chunk(2, 1)
        total = torch.cat((first, second * 2)).add_(1)
        total[1:, 0].mul_(3)
        unused = total.exp()
        del unused
        return [total, y, total.t()[1:], x.new_empty(2, 3).fill_(4)]

    x, y, other_x, other_y = (torch.randn(4, 6) for _ in range(4))
    with Recorder((x, y)) as recorder:
        made = compute(x, y)
    program = recorder.program(made)
    assert program is not None and not any(getattr(step, "function", None) is torch.ops.aten.exp.default
                                           for step, _ in program.steps)  # fmt: skip
    for found, expected in zip(program.run((other_x, other_y)), compute(other_x, other_y), strict=True):
        assert torch.equal(found, expected) and found.stride() == expected.stride()
    assert program.run((other_x, other_y))[1] is other_y


def test_autocast_around_a_later_call_changes_nothing() -> None:
    memory, x = Memory(), torch.randn(8, 8)
    expected = [memory.first("some", (x,), {}, lambda: [x @ x]) for _ in range(2)][1][0]
    with torch.autocast("cpu", torch.bfloat16):
        found = memory.again("some", (x,), {})
    assert found is not None and found[0].dtype == torch.float32 and torch.equal(found[0], expected)
