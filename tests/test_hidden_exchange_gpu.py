"""Exchanges hidden behind the experts, between ranks that are streams of one GPU: the bits of one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.runtime import exchange, fp8_experts, hopper_exchange, hopper_exchanged, hopper_in_turn, kernels
from moecompile.runtime.hopper_exchange import Exchange, Rows
from moecompile.runtime.hopper_exchanged import Brought
from moecompile.runtime.peer_memory import ROUGHLY, PeerMemory, among_streams, room_for

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

SMS, READERS, PATIENCE = 8, 16, 20.0
COLUMNS, INNER, EXPERTS, TOP_K = 512, 256, 16, 4
GATED: dict[str, Any] = {"activation": "mul(silu(gate), up)", "gate_up": "halves", "out_dtype": torch.bfloat16}
WEIGHTED: dict[str, Any] = GATED | {"activation": "mul(mul(silu(gate), up), cast(weight, bfloat16))", "output": "out"}
WIDE: dict[str, Any] = GATED | {"out_dtype": torch.float32}
BIASED: dict[str, Any] = {"activation": "square(relu(hidden))", "gate_up": "single", "out_dtype": torch.bfloat16}


class Rank:
    """One rank: its part of the experts, its memory, its stream."""

    def __init__(self, memory: PeerMemory, capacity: int, attributes: dict[str, Any], fp8: bool) -> None:
        self.memory, self.capacity, self.attributes = memory, capacity, attributes
        self.here, self.stream = EXPERTS // memory.ranks, torch.cuda.Stream()
        generator = torch.Generator("cuda").manual_seed(memory.rank)

        def randn(*shape: int) -> Tensor:
            made = torch.randn(*shape, generator=generator, device="cuda") / shape[-1] ** 0.5
            return made.to(torch.bfloat16)

        width = 2 * INNER if attributes["gate_up"] == "halves" else INNER
        w_in, w_out = randn(self.here, width, COLUMNS), randn(self.here, COLUMNS, INNER)
        self.matrices: list[Tensor | None] = [w_in, w_out]
        if attributes is BIASED:
            self.matrices += [None, randn(self.here, width), None, randn(self.here, COLUMNS)]
        quantize = torch.ops.moecompile.quantize_weights
        in_ = quantize(w_in, gate_up=attributes["gate_up"], backward=False)
        self.quantized: list[Tensor] = [*in_, *quantize(w_out, backward=False)] if fp8 else []

    def exchange(self, slot: int, patience: float = PATIENCE) -> Exchange:
        """In that slot."""
        return Exchange(self.memory, slot, self.capacity, SMS, patience)

    def hidden(
        self, tokens: Sequence[Tensor], room: int | None = None, patience: float = PATIENCE,
        how: ModuleType = hopper_exchanged,
    ) -> Tensor:  # fmt: skip
        """By two streams, or by `hopper_in_turn`."""
        x, ids, weights = tokens
        sent, home = hopper_exchange.plan(ids, EXPERTS, self.memory.ranks, self.capacity)
        brought = Brought(x, ids, weights, sent, home, EXPERTS, room)
        there, back = (self.exchange(slot, patience) for slot in (0, 1))
        given = self.matrices, self.quantized, self.attributes
        assert how.takes(brought, there, *given)
        found: Tensor = how.forward(brought, there, back, *given)
        return found

    def steps(self, tokens: Sequence[Tensor]) -> Iterator[Tensor]:
        """One after the other."""
        x, ids, weights = tokens
        sent, home = hopper_exchange.plan(ids, EXPERTS, self.memory.ranks, self.capacity)
        given = Rows.of(x, ids, weights)
        into, came = given.room(self.memory.ranks * self.capacity), sent.new_empty(self.memory.ranks)
        hopper_exchange.send(self.exchange(2), given, sent, None)
        yield sent
        hopper_exchange.receive(self.exchange(2), given, sent, into, came, self.here)
        assert into.ids is not None
        _, *plan = kernels.plan(into.ids, self.here)
        args = (into.values, into.weights, *plan, *self.matrices)
        if self.quantized:
            y = fp8_experts.experts_fp8(*args, quantized=self.quantized, **self.attributes)
        else:
            y = kernels.experts(*args, **self.attributes)
        yield y
        back = Rows(y)
        sums = back.room(len(home))
        hopper_exchange.send(self.exchange(3), back, None, came)
        yield y
        hopper_exchange.home(self.exchange(3), home, back, sums)
        yield sums.values


def ranks_of(
    counts: Sequence[int], attributes: dict[str, Any], fp8: bool, rooms: Sequence[int | None] = (None,),
    how: ModuleType = hopper_exchanged,
) -> list[Rank]:  # fmt: skip
    """For so many tokens of each, whose kernels have been loaded for these and with room for so many rows.

    To load one may wait for the device, on which one rank waits for another.
    """
    ranks, capacity, (_, ids, weights) = len(counts), max(counts), brought(0, 1)
    pitch = max(hopper_exchange.pitch_of(COLUMNS, torch.bfloat16, ids.int(), weights), 4 * COLUMNS)  # there, and back
    size = room_for(ranks, capacity, pitch)
    for count in dict.fromkeys(counts):
        for room in rooms:
            for memory in among_streams(ranks, size, 0, READERS):
                Rank(memory, capacity, attributes, fp8).hidden(brought(0, count), room, patience=0.05, how=how)
                torch.cuda.synchronize()
    return [Rank(memory, capacity, attributes, fp8) for memory in among_streams(ranks, size, 0, READERS)]


def brought(seed: int, tokens: int, dropped: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts and weights."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cuda")

    weights, ids = rand(tokens, EXPERTS).topk(TOP_K, 1)
    ids = torch.where(rand(tokens, TOP_K) < dropped, -1, ids)
    return torch.randn(tokens, COLUMNS, generator=generator, device="cuda").bfloat16(), ids, weights


def together(ranks: Sequence[Rank], call: Callable[[Rank, int], Tensor]) -> list[Tensor]:
    """What each comes to, on a stream of its own."""
    torch.cuda.synchronize()
    found = []
    for number, rank in enumerate(ranks):
        with torch.cuda.stream(rank.stream):
            found.append(call(rank, number))
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("counts", "attributes", "dropped"),
    [
        ([1024, 1024], GATED, 0.0),
        ([1500, 900], GATED, 0.3),
        ([0, 1024], GATED, 0.0),
        ([1024, 1], WEIGHTED, 0.1),
        ([1024, 1000], BIASED, 0.0),
        ([1024, 512, 1000, 0], GATED, 0.0),
        ([1024, 800], WIDE, 0.0),
    ],
    ids=["even", "dropped", "none", "weights inside", "biases", "four", "float32"],
)
def test_bit_for_bit(counts: list[int], attributes: dict[str, Any], dropped: float, fp8: bool) -> None:
    ranks = ranks_of(counts, attributes, fp8)
    for turn in range(3):
        compare(ranks, [brought(10 * turn + number, count, dropped) for number, count in enumerate(counts)])


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("counts", "attributes"),
    [([60, 33], GATED), ([0, 1, 7, 64], WEIGHTED), ([20, 20], BIASED), ([16, 9], WIDE), ([40], GATED)],
    ids=["few", "four", "biases", "float32", "one rank"],
)
def test_one_step_after_the_other_bit_for_bit(counts: list[int], attributes: dict[str, Any], fp8: bool) -> None:
    """Where there is nothing to hide, as one call."""
    ranks = ranks_of(counts, attributes, fp8, how=hopper_in_turn)
    for turn in range(3):
        compare(ranks, [brought(10 * turn + n, count, 0.2) for n, count in enumerate(counts)], hopper_in_turn)


def compare(ranks: Sequence[Rank], tokens: Sequence[Sequence[Tensor]], how: ModuleType = hopper_exchanged) -> None:
    """Three times hidden, or as one call, with once one step after the other."""
    steps = [rank.steps(mine) for rank, mine in zip(ranks, tokens, strict=True)]
    for _ in range(4):
        right = together(ranks, lambda _, number: next(steps[number]))
    for rank in ranks:  # what was there before is NaN
        rank.memory.own[-4 * rank.memory.room :].fill_(0x7F)
    for _ in range(3):
        found = together(ranks, lambda rank, number: rank.hidden(tokens[number], how=how))
        assert not any(rank.memory.failure() for rank in ranks)
        assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))
        assert not any(each.isnan().any() for each in found)


def test_rows_that_there_is_no_room_for() -> None:
    rooms = 1 << 20, 64
    ranks = ranks_of([1024, 1024], GATED, False, (None, *rooms))
    tokens = [brought(number, 1024) for number in range(2)]
    met = sum(int((ids >= EXPERTS // 2).sum()) for _, ids, _ in tokens)
    found = together(ranks, lambda rank, number: rank.hidden(tokens[number], rooms[number]))
    assert all(bool(each.isnan().all()) for each in found)
    for rank in ranks:
        said = rank.memory.failure()
        assert "assignments met experts of rank 1: raise the option `ep_rows`" in said
        assert 64 < int(said.split()[0]) < met + ROUGHLY  # without those that waited for nobody
    after = together(ranks, lambda rank, number: rank.hidden(tokens[number]))
    assert all(bool(each.isnan().all()) for each in after), "whoever goes on gets no numbers"


def test_a_rank_that_does_not_come() -> None:
    first, _ = ranks_of([1024, 1024], GATED, False)
    for _ in range(2):
        y = first.hidden(brought(0, 1024), patience=0.3)
        assert bool(y.isnan().all())
    assert first.memory.failure().startswith("rank 0 of 2 has waited too long for rank 1 (dispatch 0")


def test_room_for_a_multiple_of_what_is_even() -> None:
    """As the pass gives it: enough for random routing."""
    ranks = ranks_of([1024] * 4, GATED, False, (None, 2 * 1024 * TOP_K))
    tokens = [brought(number, 1024) for number in range(4)]
    wide = together(ranks, lambda rank, number: rank.hidden(tokens[number]))
    narrow = together(ranks, lambda rank, number: rank.hidden(tokens[number], 2 * 1024 * TOP_K))
    assert all(torch.equal(one, other) for one, other in zip(narrow, wide, strict=True))
    came = torch.full((4,), 7, dtype=torch.int32, device="cuda")
    counts = torch.full((EXPERTS // 4,), 100, dtype=torch.int32, device="cuda")
    assert torch.equal(exchange.came_within(came, counts, room=400), came)
    assert torch.equal(exchange.came_within(came, counts, room=399), torch.full_like(came, -400))
