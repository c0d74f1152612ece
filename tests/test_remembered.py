"""Calls like one before launch what a first call launches, and nothing else is taken for one of them."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fake_gpu
from fake_gpu import FakeGpu, Launched
from moecompile.codegen.instances import Dispatch
from moecompile.runtime import hopper, kernels, remembered
from moecompile.runtime.contract import TENSORS, Arguments
from moecompile.runtime.launch import DriverError, Launch
from moecompile.runtime.recording import Recorder
from moecompile.runtime.remembered import CALLS, signature
from remembered_calls import EXPERTS, FORMS, TOKENS, TOP_K, call_of, noting_checks

ops = torch.ops.moecompile
HIDDEN, INNER = 16, 24


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu.installed(monkeypatch) as installed, torch.no_grad():
        yield installed


def call(form: str = "halves", **changes: Any) -> dict[str, Any]:
    """Arguments of `experts` by name."""
    return call_of(form, HIDDEN, INNER) | changes


def run(arguments: dict[str, Any]) -> Tensor:
    attributes = {name: value for name, value in arguments.items() if name not in TENSORS}
    result: Tensor = ops.experts(*(arguments[name] for name in TENSORS), **attributes)
    return result


def launched(gpu: FakeGpu, arguments: dict[str, Any]) -> list[Launched]:
    """What a call launches."""
    gpu.taken()
    run(arguments)
    return gpu.taken()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Arguments]:
    return noting_checks(monkeypatch)


def like_first(gpu: FakeGpu, first: dict[str, Any], again: dict[str, Any]) -> None:
    """The second call is remembered from the first, and launches what it would launch as a first one."""
    launched(gpu, first)
    assert len(CALLS) == 1
    found = launched(gpu, again)
    assert len(CALLS) == 1, "the second call was taken for a new one"
    CALLS.clear()
    expected = launched(gpu, again)
    assert len(CALLS) == 1 and len(found) == 4
    for one, other in zip(found, expected, strict=True):
        assert one == other, one.instance


@pytest.mark.parametrize("form", FORMS)
def test_the_same_launches(form: str, gpu: FakeGpu, checks: list[Arguments]) -> None:
    like_first(gpu, call(form), call(form))
    assert len(checks) == 2


@pytest.mark.parametrize("name", ["x", "slots", "weights"])
def test_the_same_launches_of_tensors_that_are_copied_first(name: str, gpu: FakeGpu) -> None:
    def strided() -> dict[str, Any]:
        arguments = call()
        arguments[name] = arguments[name].t().contiguous().t()
        return arguments

    like_first(gpu, strided(), strided())


def test_memory_that_only_the_first_call_shared(gpu: FakeGpu) -> None:
    """Views of one tensor, as fused parameters are; and the same address for two arguments."""
    first = call("separate")
    both = torch.zeros(2, *first["w_in"].shape, dtype=torch.bfloat16)
    first["w_in"], first["w_up"] = both[0], both[1].view_as(both[1])
    first["b_up"] = first["b_in"].view_as(first["b_in"])
    like_first(gpu, first, call("separate"))


def test_one_tensor_for_two_arguments(gpu: FakeGpu) -> None:
    first, again = call("separate"), call("separate")
    first["w_up"] = first["w_in"]
    launched(gpu, first)
    assert not len(CALLS)
    found = launched(gpu, again)
    CALLS.clear()
    assert found == launched(gpu, again)


def changed(arguments: dict[str, Any], what: str) -> dict[str, Any]:
    """The arguments with one difference that a kernel, or whether there is one, may depend on."""
    name, _, how = what.partition(" ")
    tensor = arguments[name]
    room = torch.zeros(4 * tensor.numel() + 64, dtype=tensor.dtype) if isinstance(tensor, Tensor) else torch.zeros(0)
    match how:
        case "shape":
            return call(x=torch.zeros(TOKENS, HIDDEN + 8).bfloat16(), w_in=torch.zeros(EXPERTS, 48, 24).bfloat16(),
                        w_out=torch.zeros(EXPERTS, 24, INNER).bfloat16())  # fmt: skip
        case "strides":
            strides = (tensor.stride(0) * 2, *tensor.stride()[1:])
            return arguments | {name: room.as_strided(tensor.shape, strides)}
        case "dtype":
            return arguments | {name: tensor.bfloat16()}
        case "alignment":
            return arguments | {name: room[room.element_size() // 2 :][: tensor.numel()].view(tensor.shape)}
        case "absence":
            return arguments | {name: None, "output": "out"}
    return arguments | {name: how}


CHANGES = [
    "x shape", "x strides", "slots strides", "w_in strides", "w_out strides", "weights strides", "order strides",
    "weights dtype", "weights absence", "w_in alignment", "w_out alignment", "x alignment", "weights alignment",
    "activation mul(gelu(gate), up)", "gate_up interleaved", "output mul(out, cast(cast(weight, bfloat16), bfloat16))",
]  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_differs_is_not_taken_for_the_same(what: str, gpu: FakeGpu, checks: list[Arguments]) -> None:
    run(call())
    checks.clear()
    other = changed(call(), what)
    found = launched(gpu, other)
    assert len(checks) == 1, "a remembered call served another"
    CALLS.clear()
    assert found == launched(gpu, other)
    refused = ("w_in alignment", "w_out alignment", "order strides")
    assert bool(found) == (what not in refused), "the kernels take whole lines alone, and a plan as it is made"


@pytest.mark.parametrize(
    ("changes", "kind", "complaint"),
    [
        ({"slots": torch.zeros(TOKENS, TOP_K, dtype=torch.int64)}, TypeError, "slots must be int32"),
        ({"order": torch.zeros(5, dtype=torch.int32)}, ValueError, "order must have shape"),
        ({"weights": None}, ValueError, "reads weight but weights is None"),
        ({"gate_up": "halved"}, ValueError, "gate_up must be one of"),
        ({"kernels": "theirs"}, ValueError, "kernels must be one of"),
        ({"w_out": torch.zeros(EXPERTS, HIDDEN, INNER)}, TypeError, "write the cast"),
    ],
)  # fmt: skip
def test_refusals_stay(changes: dict[str, Any], kind: type[Exception], complaint: str, gpu: FakeGpu) -> None:
    for _ in range(2):
        run(call())
        for _ in range(2):
            with pytest.raises(kind, match=complaint):
                run(call(**changes))


def test_kernels_that_are_not_wanted(gpu: FakeGpu) -> None:
    run(call())
    assert not launched(gpu, call(kernels="reference"))
    with kernels.written_out():
        assert not launched(gpu, call())


def test_results_are_not_shared(gpu: FakeGpu) -> None:
    arguments = call("float32 result")
    results = [run(arguments) for _ in range(3)]
    assert len({result.data_ptr() for result in results}) == 3
    assert all(result.shape == (TOKENS, HIDDEN) and result.dtype == torch.float32 for result in results)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_recorded_after_inference(form: str, gpu: FakeGpu) -> None:
    arguments = call(form)
    run(arguments)
    leaves = [value for value in arguments.values() if isinstance(value, Tensor) and value.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        result = run(arguments)
    found = torch.autograd.grad(result, leaves, torch.zeros_like(result))
    assert [each.shape for each in found] == [leaf.shape for leaf in leaves]
    assert not run(arguments).requires_grad


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("strided", [False, True])
def test_plans(tokens: int, dtype: torch.dtype, strided: bool, gpu: FakeGpu) -> None:
    def launches(ids: Tensor) -> list[Launched]:
        gpu.taken()
        made = ops.plan(ids, EXPERTS)
        assert [tuple(each.shape) for each in made] == [(EXPERTS,), (EXPERTS,), (tokens, 8), (8 * tokens,)]
        return gpu.taken()

    first, again = (torch.zeros(tokens, 8, dtype=dtype) for _ in range(2))
    if strided:
        first, again = (ids.t().contiguous().t() for ids in (first, again))
    launches(first)
    found = launches(again)
    assert len(CALLS) == 1
    CALLS.clear()
    assert found == launches(again) and len(found) == (1 if tokens == 1 else 2)
    launches(again.int() if dtype != torch.int32 else again.long())
    ops.plan(again, EXPERTS + 1)
    assert len(CALLS) == 3
    with pytest.raises(ValueError, match="num_experts must be at least 1"):
        ops.plan(again, 0)


def test_no_more_is_remembered_than_there_is_room_for(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "ENTRIES", 5)
    for tokens in range(1, 20):
        gpu.taken()
        ops.plan(torch.zeros(tokens, 2, dtype=torch.int64), EXPERTS)
    assert len(CALLS) == 5
    first, *_, last = (
        signature("plan", (torch.zeros(tokens, 2, dtype=torch.int64),), {"num_experts": EXPERTS})
        for tokens in (1, 15, 19)
    )
    assert first not in CALLS._entries and last in CALLS._entries


def test_nothing_remembered_keeps_tensors_alive(gpu: FakeGpu) -> None:
    arguments = call("biased")
    alive = [weakref.ref(value) for value in arguments.values() if isinstance(value, Tensor)]
    run(arguments)
    assert len(CALLS) == 1
    arguments.clear()
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_tensor_maps_are_made_once(gpu: FakeGpu) -> None:
    """As long as addresses repeat: of six tensors, one of which is both written and read, and of two halves."""
    arguments = call()
    launched(gpu, arguments)
    assert gpu.encoded == 7  # rows, gate, up, a written, a read, w_out, y
    launched(gpu, arguments)
    assert gpu.encoded == 7
    launched(gpu, arguments | {"w_in": arguments["w_in"].clone()})
    assert gpu.encoded == 9


def test_a_tensor_map_that_is_made_is_not_remembered(gpu: FakeGpu) -> None:
    """Its address would be that of the first call."""
    kernel, x = gpu.load(Dispatch(), None), torch.zeros(4, 64).bfloat16()
    launch = Launch(kernel, 1, (hopper._mapped(x, (2, 64)).described(), x))
    with Recorder((x,)) as recorder:
        launch.run()
    assert recorder.program((x,)) is None and recorder.refused is not None
    assert recorder.refused.startswith("argument 0 of Dispatch()")


def test_a_launch_that_fails(gpu: FakeGpu) -> None:
    arguments = call()
    run(arguments)
    gpu.status = 700
    for _ in range(2):
        with pytest.raises(DriverError, match=r"cuLaunchKernelEx failed with 700: Dispatch.*arguments [0-9a-f]{64}"):
            run(arguments)


def test_a_thread_that_has_not_met_the_device(gpu: FakeGpu) -> None:
    """The driver knows no context there, as in autograd's thread before its first call of the runtime."""
    arguments = call()
    run(arguments)
    before = len(gpu.launched)
    gpu.status = 201
    run(arguments)
    assert gpu.contexts == [None]  # the kernel's
    assert len(gpu.launched) == before + 5  # the first was refused and launched again


def test_another_device_is_current(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the kernel's while they are launched, and not after."""
    arguments = call()
    expected = (launched(gpu, arguments), launched(gpu, arguments))[1]

    @contextlib.contextmanager
    def device(index: int | None) -> Iterator[None]:
        before, gpu.current = gpu.current, index
        yield
        gpu.current = before

    monkeypatch.setattr(torch.cuda, "device", device)
    gpu.current = 3
    assert launched(gpu, arguments) == expected and gpu.current == 3
    assert gpu.devices[-1] is None


def test_threads_do_not_share_arguments(gpu: FakeGpu) -> None:
    """Each launch has memory of its own while the driver reads it, which it does without holding the GIL."""
    kernel = gpu.load(Dispatch(), None)
    kernel.pack(bytes(64))
    gpu.pause = 1e-4
    wanted = [bytes([i]) * 64 for i in range(200)]

    def launch_every_fourth(first: int) -> None:
        for arguments in wanted[first::4]:
            kernel.launch(1, arguments)

    threads = [threading.Thread(target=launch_every_fourth, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.arguments for each in gpu.launched) == wanted
    assert 1 <= len(kernel.idle) <= 4


def test_tokens_that_begin_within_a_line(gpu: FakeGpu) -> None:
    """Dispatch reads 16 bytes at once: it is given a copy."""
    room = torch.zeros(TOKENS * HIDDEN + 8).bfloat16()
    arguments = call(x=room[1 : TOKENS * HIDDEN + 1].view(TOKENS, HIDDEN))
    for _ in range(2):
        address = int.from_bytes(launched(gpu, arguments)[0].arguments[:8], "little")
        assert address % 16 == 0 and address != arguments["x"].data_ptr()
