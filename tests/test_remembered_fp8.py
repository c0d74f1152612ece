"""FP8 calls like one before launch what a first call launches, and nothing else is taken for one of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fake_gpu
from fake_gpu import FakeGpu, Launched
from moecompile.codegen.gemms import GroupedGemm
from moecompile.codegen.instances import Combine, QuantizeRows
from moecompile.runtime.contract import TENSORS, Arguments
from moecompile.runtime.quantize import blocks_in
from moecompile.runtime.remembered import CALLS
from remembered_calls import EXPERTS, FORMS, TOKENS, TOP_K, call_of, noting_checks

ops = torch.ops.moecompile
HIDDEN, INNER = 144, 80
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu.installed(monkeypatch) as installed, torch.no_grad():
        yield installed


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Arguments]:
    return noting_checks(monkeypatch)


def call(form: str = "halves", tokens: int = TOKENS, **changes: Any) -> dict[str, Any]:
    """Arguments of `experts_fp8` by name."""
    given = call_of(form, HIDDEN, INNER, tokens)
    halves = 1 if given["gate_up"] == "single" else 2
    quantized = [*copies(halves * blocks_in(INNER, 128), HIDDEN), *copies(blocks_in(HIDDEN, 128), INNER)]
    return given | {"quantized": quantized} | changes


def copies(down: int, features: int) -> list[Tensor]:
    """Matrices of so many blocks of rows as `quantize_weights` gives them."""
    across = blocks_in(features, 128)
    made = []
    for blocks in ((down, across), (across, down)):
        made.append(torch.zeros(EXPERTS, *(128 * count for count in blocks), dtype=torch.uint8).view(E4M3))
        made.append(torch.zeros(EXPERTS, *blocks))
    return made


def run(arguments: dict[str, Any]) -> Tensor:
    attributes = {name: value for name, value in arguments.items() if name not in TENSORS}
    result: Tensor = ops.experts_fp8(*(arguments[name] for name in TENSORS), **attributes)
    return result


def launched(gpu: FakeGpu, arguments: dict[str, Any]) -> list[Launched]:
    """What a call launches."""
    gpu.taken()
    run(arguments)
    return gpu.taken()


def like_first(gpu: FakeGpu, first: dict[str, Any], again: dict[str, Any]) -> None:
    """The second call is remembered from the first, and launches what it would launch as a first one."""
    launched(gpu, first)
    assert len(CALLS) == 1
    found = launched(gpu, again)
    assert len(CALLS) == 1, "the second call was taken for a new one"
    CALLS.clear()
    expected = launched(gpu, again)
    assert [type(each.instance) for each in found] == [QuantizeRows, GroupedGemm, GroupedGemm, Combine]
    for one, other in zip(found, expected, strict=True):
        assert one == other, one.instance


@pytest.mark.parametrize("tokens", [1, 2, TOKENS, 70])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_launches(form: str, tokens: int, gpu: FakeGpu, checks: list[Arguments]) -> None:
    like_first(gpu, call(form, tokens), call(form, tokens))
    assert len(checks) == 2


@pytest.mark.parametrize("name", ["x", "slots", "weights", "b_in", "b_up", "b_out"])
def test_the_same_launches_of_tensors_that_are_copied_first(name: str, gpu: FakeGpu) -> None:
    def strided() -> dict[str, Any]:
        arguments = call("separate")
        arguments[name] = arguments[name].t().contiguous().t()
        return arguments

    like_first(gpu, strided(), strided())


@pytest.mark.parametrize("name", ["x", "b_in", "b_up", "b_out"])
def test_tensors_that_begin_within_a_line(name: str, gpu: FakeGpu) -> None:
    """Kernels read several elements at once: they are given copies, as those that lie otherwise."""

    def moved() -> dict[str, Any]:
        arguments = call("separate")
        arguments[name] = shifted(arguments[name])
        return arguments

    arguments = moved()
    like_first(gpu, moved(), arguments)
    places = [int.from_bytes(each.arguments[at : at + 8], "little") for each in launched(gpu, arguments)
              for at in range(0, len(each.arguments), 8)]  # fmt: skip
    assert arguments[name].data_ptr() not in places


def shifted(tensor: Tensor, by: int = 1) -> Tensor:
    """A tensor like that, beginning so many elements after a line of memory does."""
    room = torch.zeros(tensor.numel() + by, dtype=torch.uint8 if tensor.dtype == E4M3 else tensor.dtype)
    return room.view(tensor.dtype)[by:].view(tensor.shape)


def test_where_every_argument_lies(gpu: FakeGpu) -> None:
    """A remembered call reads its own tensors, whose addresses are all others than those of the first."""
    first, again = call("separate"), call("separate")
    known: set[int] = set()
    for arguments in (first, again):
        found = launched(gpu, arguments)
        words = {each.arguments[at : at + 8] for each in found for at in range(0, len(each.arguments), 8)}
        quantized = arguments["quantized"]
        by_pointer = [arguments[name] for name in TENSORS if name not in ("w_in", "w_out", "w_up", "order")]
        addresses = {each.data_ptr() for each in (*by_pointer, quantized[1], quantized[5])}
        assert {address.to_bytes(8, "little") for address in addresses} <= words
        assert not words & {address.to_bytes(8, "little") for address in known}
        known |= addresses


def test_each_tensor_map_follows_its_tensor(gpu: FakeGpu) -> None:
    """As long as addresses repeat maps are made once: of rows, a, their scales, a and y as written; and of matrices."""
    arguments = call()
    launched(gpu, arguments)
    assert gpu.encoded == 9  # rows, their scales, gate, up, a written, a read, its scales, w_out, y
    launched(gpu, arguments)
    assert gpu.encoded == 9
    for place, made in ((0, 11), (4, 12), (1, 12), (5, 12), (2, 12), (6, 12)):
        quantized = arguments["quantized"] = [*arguments["quantized"]]
        quantized[place] = torch.zeros_like(quantized[place].view(torch.uint8)).view(quantized[place].dtype)
        launched(gpu, arguments)
        assert gpu.encoded == made and len(CALLS) == 1


def test_memory_that_only_the_first_call_shared(gpu: FakeGpu) -> None:
    """Scales of one block are their own transposed; views are objects of their own."""
    first = call()
    first["quantized"][7] = first["quantized"][5].view(EXPERTS, 1, 2)
    like_first(gpu, first, call())


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
    if name.isdigit():
        quantized = [*arguments["quantized"]]
        quantized[int(name)] = other(quantized[int(name)], how)
        return arguments | {"quantized": quantized}
    if how == "absence":
        return arguments | {name: None, "output": "out"}
    if how in ("strides", "dtype", "alignment"):
        return arguments | {name: other(arguments[name], how)}
    return arguments | {name: how}


def other(tensor: Tensor, how: str) -> Tensor:
    """A tensor like that but for its strides, dtype or alignment."""
    if how == "dtype":
        return tensor.bfloat16()
    if how == "alignment":
        return shifted(tensor)
    bytes_of = torch.zeros(4 * tensor.nbytes, dtype=torch.uint8).view(tensor.dtype)
    return bytes_of.as_strided(tensor.shape, (tensor.stride(0) * 2, *tensor.stride()[1:]))


OURS = [
    "x strides", "slots strides", "w_in strides", "w_out strides", "weights strides", "order strides", "b_in strides",
    "b_out strides", "weights dtype", "weights absence", "b_in absence", "b_out absence", "w_in alignment",
    "w_out alignment", "x alignment", "weights alignment", "b_in alignment", "b_out alignment",
    "activation mul(gelu(gate), up)", "gate_up interleaved", "output mul(out, cast(cast(weight, bfloat16), bfloat16))",
]  # fmt: skip
THEIRS = [f"{place} {how}" for place in range(8) for how in ("strides", "alignment")]


@pytest.mark.parametrize("what", [*OURS, *THEIRS])
def test_what_differs_is_not_taken_for_the_same(what: str, gpu: FakeGpu, checks: list[Arguments]) -> None:
    run(call("biased"))
    checks.clear()
    arguments = changed(call("biased"), what)
    found = launched(gpu, arguments)
    assert len(checks) == 1, "a remembered call served another"
    CALLS.clear()
    assert found == launched(gpu, arguments)
    refused = (*THEIRS, "order strides")
    assert bool(found) == (what not in refused), "the kernels take copies and plans as they are made, alone"


def test_other_sizes_are_not_taken_for_the_same(gpu: FakeGpu, checks: list[Arguments]) -> None:
    for tokens in (1, 2, 3, 4, 5):
        run(call(tokens=tokens))
    assert len(checks) == len(CALLS) == 5
    for tokens in (5, 2):
        assert run(call(tokens=tokens)).shape == (tokens, HIDDEN)
    assert len(checks) == 5


def test_arguments_that_are_left_out(gpu: FakeGpu, checks: list[Arguments]) -> None:
    """None and what is left out are the same call, and the copies are none of the arguments that may come last."""
    arguments = call()
    attributes = {name: value for name, value in arguments.items() if name not in TENSORS}
    expected = launched(gpu, arguments)
    gpu.taken()
    ops.experts_fp8(*(arguments[name] for name in TENSORS[:7]), **attributes)
    assert gpu.taken() == launched(gpu, arguments) and len(expected) == 4 and len(checks) == 1
    first, *rest = arguments["quantized"]
    for name in ("w_up", "b_in", "b_up", "b_out"):
        with pytest.raises((ValueError, TypeError), match="moecompile::experts"):
            run(arguments | {name: first, "quantized": rest})


@pytest.mark.parametrize(
    ("changes", "kind", "complaint"),
    [
        ({"slots": torch.zeros(TOKENS, TOP_K, dtype=torch.int64)}, TypeError, "slots must be int32"),
        ({"order": torch.zeros(5, dtype=torch.int32)}, ValueError, "order must have shape"),
        ({"weights": None}, ValueError, "reads weight but weights is None"),
        ({"gate_up": "halved"}, ValueError, "gate_up must be one of"),
        ({"kernels": "theirs"}, ValueError, "kernels must be one of"),
        ({"input": "mul(x, cast(weight, bfloat16))"}, ValueError, "input must be 'x'"),
        ({"output": "neg(out)"}, ValueError, "output must be 'out' or"),
        ({"b_out": torch.zeros(EXPERTS, HIDDEN)}, TypeError, "b_out must have the weights' dtype"),
        ({"quantized": []}, ValueError, "quantized must hold 8 tensors"),
    ],
)
def test_refusals_stay(changes: dict[str, Any], kind: type[Exception], complaint: str, gpu: FakeGpu) -> None:
    for _ in range(2):
        run(call())
        for _ in range(2):
            with pytest.raises(kind, match=complaint):
                run(call(**changes))


@pytest.mark.parametrize("place", range(8))
def test_refusals_of_copies_stay(place: int, gpu: FakeGpu) -> None:
    run(call())
    for _ in range(2):
        for how, kind in (("shape", ValueError), ("dtype", TypeError)):
            quantized = call()["quantized"]
            quantized[place] = quantized[place][1:] if how == "shape" else other(quantized[place], how)
            with pytest.raises(kind, match=r"of quantized must .* got .*; pass \[\*quantize_weights"):
                run(call(quantized=quantized))


def test_kernels_that_are_not_wanted(gpu: FakeGpu) -> None:
    run(call())
    assert not launched(gpu, call(kernels="reference"))
    assert launched(gpu, call())


def test_results_are_not_shared(gpu: FakeGpu) -> None:
    arguments = call("float32 result")
    results = [run(arguments) for _ in range(3)]
    assert len({result.data_ptr() for result in results}) == 3
    assert all(result.shape == (TOKENS, HIDDEN) and result.dtype == torch.float32 for result in results)


@pytest.mark.parametrize("form", FORMS)
def test_training_after_inference(form: str, gpu: FakeGpu) -> None:
    """Its forward launches the same but for what it saves, and is remembered as another call."""
    arguments = call(form)
    inference = launched(gpu, arguments)
    leaves = [value for value in arguments.values() if isinstance(value, Tensor) and value.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        result = run(arguments)
    training = gpu.taken()
    assert len(CALLS) == 2 and result.requires_grad
    assert [type(each.instance) for each in training] == [type(each.instance) for each in inference]
    assert training[0].arguments != inference[0].arguments, "the tokens are saved"
    assert not run(arguments).requires_grad and len(CALLS) == 2


def test_what_the_kernels_do_not_take(gpu: FakeGpu) -> None:
    """It is emulated, each time."""
    arguments = call(tokens=0)
    for _ in range(2):
        assert not launched(gpu, arguments) and not len(CALLS)


def test_nothing_remembered_keeps_tensors_alive(gpu: FakeGpu) -> None:
    arguments = call("biased")
    given = [*arguments["quantized"], *arguments.values()]
    alive = [weakref.ref(value) for value in given if isinstance(value, Tensor)]
    run(arguments)
    assert len(CALLS) == 1
    arguments.clear()
    given.clear()
    gc.collect()
    assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize("form", ["halves", "separate", "single"])
def test_rows_that_have_travelled(form: str, gpu: FakeGpu) -> None:
    """Forward and backward of lines quantise nothing, dispatch what came, and are remembered as others are."""

    def step() -> list[list[Launched]]:
        arguments = call(form) | {"b_in": None, "b_up": None, "b_out": None}
        attributes = {name: value for name, value in arguments.items() if name not in TENSORS}
        x, *rest = (arguments[name] for name in TENSORS)
        gpu.taken()
        _, saved = ops.experts_fp8_forward(ops.to_lines(x), *rest, **attributes, lines=True)
        forward, needs = gpu.taken(), [True, True, True, True, form == "separate", False, False, False]
        grad = ops.to_lines(torch.randn(TOKENS, HIDDEN).bfloat16())
        ops.experts_fp8_backward(grad, saved, *rest, **attributes, needs=needs, lines=True)
        return [forward, gpu.taken()]

    first = step()
    remembered = len(CALLS)
    found = step()
    assert len(CALLS) == remembered == 2, "the second calls were taken for new ones"
    for one, other in zip(first, found, strict=True):
        assert [each.instance for each in one] == [each.instance for each in other]
        products = [each.instance for each in other if isinstance(each.instance, GroupedGemm)]
        assert products[0].dispatches and {*products} <= gpu.announced, "compiled one by one"
        assert not any(isinstance(each.instance, QuantizeRows) for each in other)
