"""Hidden exchanges that are remembered launch on both streams what a first call launches, without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fake_gpu
from fake_gpu import STREAM, FakeGpu, Launched
from moecompile.codegen.exchanges import (
    ExchangeGate,
    ExchangeHome,
    ExchangeHomeOfExperts,
    ExchangeReceive,
    ExchangeSend,
)
from moecompile.codegen.gemms import GroupedGemm
from moecompile.codegen.instances import QuantizeRows
from moecompile.runtime import exchange, exchanged, linear_fp8
from moecompile.runtime.peer_memory import SLOTS_USED, WORDS, PeerMemory, room_for
from moecompile.runtime.recording import _Waited
from moecompile.runtime.remembered import CALLS

ops = torch.ops.moecompile
TOKENS, FEATURES, INNER, EXPERTS, TOP_K, SIDE = 64, 128, 128, 8, 2, 78
GATED: dict[str, Any] = {"activation": "mul(silu(gate), up)", "gate_up": "halves", "out_dtype": torch.bfloat16}
TRAVEL: dict[str, Any] = {"ranks": 2, "group": "none", "capacity": TOKENS, "slot": 0, "sms": 4, "patience": 1.0}
Waits = list[tuple[int, int]]


@dataclass(eq=False)
class Stream:
    """Of a GPU that is not there."""

    cuda_stream: int
    waits: Waits = field(default_factory=list)
    device: str = "cpu"

    def wait_stream(self, other: Stream) -> None:
        self.waits.append((self.cuda_stream, other.cuda_stream))


class Streams:
    """The caller's and another, one of which is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: Waits = []
        self.caller, self.side = (Stream(number, self.waits) for number in (STREAM, SIDE))
        self.current = self.caller
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        raw = lambda device: self.current.cuda_stream  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", raw, raising=False)

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu.installed(monkeypatch) as installed, torch.no_grad():
        installed.streams = (STREAM, SIDE)
        yield installed


@pytest.fixture
def streams(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Streams:
    """With the memory of the second of two ranks."""
    made = Streams(monkeypatch)
    room = room_for(2, TOKENS, 4 * FEATURES + 32)
    own, words = torch.zeros(WORDS + SLOTS_USED * room, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    memory = PeerMemory(own, words, 1, room, torch.zeros(1, dtype=torch.int64))
    vars(memory)["side"] = made.side
    monkeypatch.setattr(exchange, "memory_for", lambda *_, **__: memory)
    monkeypatch.setattr(exchanged, "hides", lambda *_: True)
    return made


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, streams: Streams) -> None:
    """Tokens, which hide nothing."""
    monkeypatch.setattr(exchanged, "hides", lambda *_: False)


def call(
    dtype: torch.dtype = torch.float32, fp8: bool = False, room: int | None = None, backward: bool = False
) -> dict[str, Any]:
    """Arguments of a call, with routing weights of that dtype."""
    ids = torch.arange(TOKENS * TOP_K).view(TOKENS, TOP_K) % EXPERTS
    sent, home = torch.zeros(2 * TOKENS, dtype=torch.int32), torch.zeros(TOKENS, 2, dtype=torch.int32)
    x = torch.randn(TOKENS, FEATURES).bfloat16()
    w_in = torch.randn(EXPERTS // 2, 2 * INNER, FEATURES).bfloat16()
    w_out = torch.randn(EXPERTS // 2, FEATURES, INNER).bfloat16()
    copies: list[Tensor] = []
    if fp8:
        copies = [
            *ops.quantize_weights(w_in, gate_up="halves", backward=backward),
            *ops.quantize_weights(w_out, backward=backward),
        ]
    tensors = (x, ids, torch.rand(TOKENS, TOP_K).to(dtype), sent, home, w_in, w_out)
    return {"tensors": tensors, "quantized": copies, "room": room}


def launched(gpu: FakeGpu, streams: Streams, given: dict[str, Any]) -> tuple[list[Launched], Waits]:
    """What a call launches on which stream, and which stream waited for which."""
    gpu.taken()
    streams.waits.clear()
    more = {"room": given["room"], "quantized": given["quantized"], "num_experts": EXPERTS}
    result = ops.exchanged_experts(*given["tensors"], **GATED, **TRAVEL, **more)
    assert result.shape == (TOKENS, FEATURES) and result.dtype == torch.bfloat16
    assert streams.current is streams.caller
    return gpu.taken(), [*streams.waits]


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("room", [None, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_launches(gpu: FakeGpu, streams: Streams, dtype: torch.dtype, room: int | None, fp8: bool) -> None:
    first = launched(gpu, streams, call(dtype, fp8, room))
    remembered = len(CALLS)
    given = call(dtype, fp8, room)
    found = launched(gpu, streams, given)
    assert len(CALLS) == remembered > 0, "the second call was taken for a new one"
    CALLS.clear()
    expected = launched(gpu, streams, given)
    assert found == expected and len(found[0]) == len(first[0])
    assert found[1] == [(SIDE, STREAM), (SIDE, STREAM), (STREAM, SIDE), (STREAM, SIDE)]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("room", [None, 96])
def test_few_tokens_take_one_stream(gpu: FakeGpu, streams: Streams, room: int | None, fp8: bool) -> None:
    """And are remembered likewise: one step after the other, of kernels alone."""
    first, waits = launched(gpu, streams, call(fp8=fp8, room=room))
    exchanging = [type(each.instance) for each in first if type(each.instance).__name__.startswith("Exchange")]
    assert exchanging == [ExchangeSend, ExchangeReceive, ExchangeSend, ExchangeHome]
    assert {each.stream for each in first} == {STREAM} and all(each.early for each in first) and not waits
    remembered, given = len(CALLS), call(fp8=fp8, room=room)
    found, _ = launched(gpu, streams, given)
    assert len(CALLS) == remembered > 0, "the second call was taken for a new one"
    CALLS.clear()
    assert found == launched(gpu, streams, given)[0]


def gemms(launches: list[Launched]) -> list[GroupedGemm | None]:
    """Which of them is a product."""
    return [each.instance if isinstance(each.instance, GroupedGemm) else None for each in launches]


def trained(gpu: FakeGpu, given: dict[str, Any], needs: list[bool], **more: Any) -> list[list[Launched]]:
    """What a forward that saves launches, and its backward."""
    gpu.taken()
    x, *_, sent, home, w_in, w_out = given["tensors"]
    attributes = {**GATED, **TRAVEL, "quantized": given["quantized"], "room": given["room"], "num_experts": EXPERTS}
    result, saved = ops.exchanged_experts_forward(*given["tensors"], **attributes, **more)
    forward, grad, again = gpu.taken(), torch.randn(result.shape).bfloat16(), x if more.get("again") else None
    ops.exchanged_experts_backward(grad, saved, again, sent, home, w_in, w_out, **attributes, **more, needs=needs)
    return [forward, gpu.taken()]


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("more", [{}, {"again": True}, {"recompute": True}], ids=["saved", "again", "recomputed"])
def test_training_is_remembered(
    gpu: FakeGpu, streams: Streams, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], fp8: bool
) -> None:
    """A program there and one back, one step after the other but for what goes home behind the last gradients."""
    monkeypatch.setattr(linear_fp8, "has_kernels", lambda _: True)
    room, needs = (96 if more else None), [True] * 4 + [False] * 4

    def step() -> list[list[Launched]]:
        return trained(gpu, call(fp8=fp8, room=room, backward=True), needs, **more)

    first = step()
    remembered = len(CALLS)
    found = step()
    assert len(CALLS) == remembered == 2, "the second calls were taken for new ones"
    for one, other in zip(first, found, strict=True):
        assert [each.instance for each in one] == [each.instance for each in other]
    exchanging = [
        [type(each.instance) for each in part if type(each.instance).__name__.startswith("Exchange")] for part in found
    ]
    there, home = [ExchangeSend, ExchangeReceive], [ExchangeSend, ExchangeHome]
    gated = [ExchangeSend, ExchangeGate, ExchangeHome]
    assert exchanging == [there + home, (there if "again" in more else []) + there + gated]
    assert streams.waits == [(SIDE, STREAM), (STREAM, SIDE)] * 2, "once in each backward"
    forward, back = found
    assert {each.stream for each in forward} == {STREAM}
    (aside,) = [number for number, each in enumerate(back) if each.stream == SIDE]
    assert isinstance(back[aside].instance, ExchangeSend) and isinstance(back[aside + 1].instance, ExchangeGate)
    assert isinstance(back[-1].instance, ExchangeHome)
    products = [(number, gemm) for number, gemm in enumerate(gemms(back)) if gemm is not None]
    assert [gemm.taken for _, gemm in products] == [number > aside and not fp8 for number, _ in products]
    assert products[-1][1].over_rows and products[-1][0] > aside, "nothing is computed while it is on its way"
    assert {gemm for _, gemm in products} <= gpu.announced, "compiled one by one, while other ranks wait"
    sent = [part[0].instance for part in found]
    assert [isinstance(each, QuantizeRows) for each in sent] == [fp8, fp8], "rows travel as they are read"


@pytest.mark.usefixtures("streams")
def test_memory_is_given_back_on_the_way(gpu: FakeGpu) -> None:
    """But for what another stream is told of: not before the caller's waits for it."""
    for _ in range(2):
        trained(gpu, call(), [True] * 4 + [False] * 4)
    programs = [each for each in CALLS._entries.values() if any(isinstance(step, _Waited) for step, _ in each.steps)]
    ((steps, results),) = [(program.steps, program.results) for program in programs]
    (aside,) = [number for number, (step, _) in enumerate(steps) if getattr(step, "stream", None) is not None]
    leaves, joins = (number for number, (step, _) in enumerate(steps) if isinstance(step, _Waited))
    assert leaves < aside < joins
    dropped = {place: number for number, (_, places) in enumerate(steps) for place in places}
    assert any(number < leaves for number in dropped.values()) and len(dropped) == sum(
        len(places) for _, places in steps
    )
    told = {*steps[aside][0].uses}
    assert told and all(dropped[place] >= joins for place in told - {*results})


class NoMemoryError(Exception):
    """Where something was to be made."""


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("remembered", [False, True])
def test_what_is_on_its_way_comes_home_whatever_fails(
    gpu: FakeGpu, streams: Streams, monkeypatch: pytest.MonkeyPatch, fp8: bool, remembered: bool
) -> None:
    """Or the slot's next exchange would be taken for this one, and memory be given back that is read."""
    monkeypatch.setattr(linear_fp8, "has_kernels", lambda _: True)
    given, needs = call(fp8=fp8, backward=True), [True] * 4 + [False] * 4
    for _ in range(3 * remembered):
        trained(gpu, given, needs)
    *_, sent, home, w_in, w_out = given["tensors"]
    attributes = {**GATED, **TRAVEL, "quantized": given["quantized"], "room": None, "num_experts": EXPERTS}
    result, saved = ops.exchanged_experts_forward(*given["tensors"], **attributes)
    gpu.taken()
    streams.waits.clear()
    new_empty = Tensor.new_empty

    def full(like: Tensor, *size: Any, **how: Any) -> Tensor:
        made = new_empty(like, *size, **how)
        if made.shape == w_in.shape:
            raise NoMemoryError
        return made

    with pytest.raises(NoMemoryError), monkeypatch.context() as patched:
        patched.setattr(Tensor, "new_empty", full)
        ops.exchanged_experts_backward(
            torch.randn(result.shape).bfloat16(), saved, None, sent, home, w_in, w_out, **attributes, needs=needs
        )
    found = gpu.taken()
    assert isinstance(found[-1].instance, ExchangeHome) and streams.waits == [(SIDE, STREAM), (STREAM, SIDE)]
    assert sum(isinstance(each.instance, ExchangeSend) for each in found) == 2


@pytest.mark.usefixtures("streams")
def test_nothing_goes_back_that_nobody_needs(gpu: FakeGpu) -> None:
    needs = [False, False, True, True, *[False] * 4]
    _, back = trained(gpu, call(), needs)
    kinds = [type(each.instance) for each in back]
    assert kinds.count(ExchangeSend) == 1 and ExchangeHome not in kinds


def test_what_runs_where(gpu: FakeGpu, streams: Streams) -> None:
    """Sends and what waits for other ranks are on the other stream; what takes ids does not begin early."""
    found, _ = launched(gpu, streams, call())
    on = {STREAM: list[Any](), SIDE: list[Any]()}
    for each in found:
        on[each.stream].append(each.instance)
    kinds = [type(each) for each in on[SIDE]]
    assert kinds[0] is ExchangeSend and kinds[-1] is ExchangeSend and kinds[1] is ExchangeReceive
    assert [type(each) for each in on[STREAM]][-1] is ExchangeHomeOfExperts
    assert ExchangeGate() in on[STREAM] and not {ExchangeSend, ExchangeReceive} & {type(each) for each in on[STREAM]}
    assert {type(each.instance) for each in found if not each.early} == {ExchangeSend, ExchangeReceive}
    products = [each for each in found if each.instance.name.startswith("moecompile_grouped_gemm")]
    assert [each.stream for each in products] == [STREAM, SIDE, SIDE, STREAM]
    assert {each.instance for each in products} <= gpu.announced, "compiled one by one, while other ranks wait"


def test_what_is_sent_aside(gpu: FakeGpu, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the other stream; what is computed meanwhile begins when all blocks that send have, and the wait joins."""
    monkeypatch.setattr(exchange, "by_kernels", lambda *_: True)
    x, ids, weights, sent, home, *_ = call()["tensors"]
    gpu.taken()
    tokens = x, ids, weights, sent, home
    begun = ops.dispatch_start(*tokens, **TRAVEL, aside=True)
    assert streams.waits == [(SIDE, STREAM)]
    send, gate = gpu.taken()
    assert (type(send.instance), send.stream, send.early) == (ExchangeSend, SIDE, False)
    assert (type(gate.instance), gate.stream) == (ExchangeGate, STREAM)
    *_, came = ops.dispatch_wait(*begun, *tokens, num_experts=EXPERTS, **TRAVEL)
    (receive,) = gpu.taken()
    assert streams.waits[1:] == [(STREAM, SIDE)] and receive.stream == STREAM
    y = torch.randn(2 * TOKENS, FEATURES).bfloat16()
    for aside in (False, True):
        streams.waits.clear()
        parts = ops.combine_start(y, None, came, sent, home, **TRAVEL, aside=aside)
        ops.combine_wait(*parts, y, None, sent, home, **TRAVEL)
        kinds = [(type(each.instance), each.stream) for each in gpu.taken()]
        gated = [(ExchangeSend, SIDE), (ExchangeGate, STREAM)] if aside else [(ExchangeSend, STREAM)]
        assert kinds == [*gated, (ExchangeHome, STREAM)] and len(streams.waits) == 2 * aside


@pytest.mark.usefixtures("streams")
def test_copies_that_nobody_has_may_be_one_tensor(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the pass `recast` gives them."""
    monkeypatch.setattr(linear_fp8, "has_kernels", lambda _: True)
    for _ in range(2):
        given = call(fp8=True)
        in_, in_scales, nothing, no_scales, out, out_scales, *_ = given["quantized"]
        copies = [in_, in_scales, nothing, no_scales, out, out_scales, nothing, no_scales]
        attributes = {**GATED, **TRAVEL, "quantized": copies, "num_experts": EXPERTS}
        ops.exchanged_experts_forward(*given["tensors"], **attributes)
    assert len(CALLS) == 1
