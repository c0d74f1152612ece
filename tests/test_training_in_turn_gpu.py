"""Experts between ranks that are streams of one GPU, in training: what goes home behind gradients, and after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.runtime import hopper_exchange, hopper_experts, hopper_in_turn, main_gradients
from moecompile.runtime.contract import Arguments
from moecompile.runtime.exchanged_contract import Experts, Returning, Saved, Wanted
from moecompile.runtime.hopper_exchange import Exchange, Rows
from moecompile.runtime.hopper_exchanged import Brought
from moecompile.runtime.peer_memory import PeerMemory, among_streams, room_for
from test_hidden_exchange_gpu import COLUMNS, EXPERTS, GATED, INNER, READERS, SMS, WEIGHTED, brought

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

SCALED: dict[str, Any] = GATED | {"output": "mul(out, cast(weight, bfloat16))"}
SEPARATE: dict[str, Any] = SCALED | {"gate_up": "separate"}
INTERLEAVED: dict[str, Any] = SCALED | {"gate_up": "interleaved"}
SINGLE: dict[str, Any] = SCALED | {"activation": "square(relu(hidden))", "gate_up": "single"}
TURNED: dict[str, Any] = SCALED | {"w_in_transposed": True, "w_out_transposed": True}
Backward = Callable[[Returning, Exchange, Exchange, Experts, Arguments, Wanted], dict[str, Tensor]]
NO_MATRIX = [True, True, *[False] * 6]


def after(
    of: Returning, there: Exchange, back: Exchange, experts: Experts, args: Arguments, wanted: Wanted
) -> dict[str, Tensor]:
    """As `hopper_in_turn.backward`, on one stream: what goes home does so in the end."""
    if experts.quantized:
        grads = hopper_in_turn._backward_of_rows(of, of.saved, back, experts, args, wanted, None)
    else:
        of_y, (rows,), (hidden,) = hopper_in_turn._dispatched(of.grad, back, of.sent), of.saved.of_rows, of.saved.hidden
        added, _ = main_gradients.divided(wanted.main)
        needs = wanted.names_of_rows
        grads = hopper_experts.backward(replace(args, x=rows), of_y, hidden, needs, added)
    if wanted.goes_back:
        home = Rows(grads["x"], None, grads.get("weights"))
        into = hopper_in_turn._returned(home, there, of.saved.came, of.home)
        grads |= {"x": into.values} | ({} if into.weights is None else {"weights": into.weights})
    return grads


class Rank:
    """One rank: its part of the experts, its memory, its stream."""

    def __init__(self, memory: PeerMemory, capacity: int, attributes: dict[str, Any], fp8: bool) -> None:
        self.memory, self.stream, self.capacity = memory, torch.cuda.Stream(), capacity
        self.here, self.attributes, self.fp8 = EXPERTS // memory.ranks, attributes, fp8
        generator = torch.Generator("cuda").manual_seed(memory.rank)

        def randn(transposed: bool, *shape: int) -> Tensor:
            made = (torch.randn(*shape, generator=generator, device="cuda") / shape[-1] ** 0.5).bfloat16()
            return made.mT.contiguous() if transposed else made

        gate_up, turned = attributes["gate_up"], attributes.get("w_in_transposed", False)
        width = 2 * INNER if gate_up in ("halves", "interleaved") else INNER
        w_in, w_out = randn(turned, self.here, width, COLUMNS), randn(turned, self.here, COLUMNS, INNER)
        w_up = randn(turned, self.here, width, COLUMNS) if gate_up == "separate" else None
        self.matrices, quantize = [w_in, w_out], torch.ops.moecompile.quantize_weights
        self.matrices += [] if w_up is None else [w_up]
        in_ = quantize(w_in, w_up, gate_up=gate_up, transposed=turned)
        self.quantized = [*in_, *quantize(w_out, transposed=turned)] if fp8 else []

    def step(
        self, tokens: Sequence[Tensor], grad: Tensor, backward: Backward, needs: Sequence[bool], slot: int,
        room: int | None = None, patience: float = 20.0, main: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The result and the needed gradients."""
        x, ids, weights = tokens
        travel = {"ranks": self.memory.ranks, "group": "", "capacity": self.capacity, "slot": slot, "sms": SMS}
        experts = Experts.of(
            self.matrices, num_experts=EXPERTS, quantized=self.quantized, room=room, patience=patience,
            **travel, **self.attributes,
        )  # fmt: skip
        sent, home = hopper_exchange.plan(ids, EXPERTS, self.memory.ranks, self.capacity)
        there, back = experts.exchanges(self.memory)
        brought = Brought(x, ids, weights, sent, home, EXPERTS, room)
        result, saved = hopper_in_turn.forward_saving(brought, there, back, experts)
        kept = Saved.of(saved.every, experts, "step")
        of, wanted = Returning(grad, kept, None, sent, home), Wanted(tuple(needs), main or {}, True)
        found = backward(of, there, back, experts, kept.arguments(experts), wanted)
        return {"result": result, **found}


def poison() -> None:
    """What memory is given next holds no numbers."""
    torch.full((1 << 28,), float("nan"), device="cuda")
    torch.cuda.synchronize()


def zeros_for(rank: Rank) -> dict[str, Tensor]:
    """Main gradients."""
    w_in, w_out, *_ = rank.matrices
    return {name: torch.zeros_like(each, dtype=torch.float32) for name, each in (("w_in", w_in), ("w_out", w_out))}


def ranks_of(
    counts: Sequence[int], attributes: dict[str, Any], fp8: bool, room: int | None = None, adding: bool = False
) -> list[Rank]:
    """For so many tokens of each, whose kernels have been loaded: to load one may wait for the device."""
    ranks, capacity, (_, ids, weights) = len(counts), max(counts), brought(0, 1)
    size = room_for(ranks, capacity, hopper_exchange.pitch_of(COLUMNS, torch.float32, ids.int(), weights))
    for count in dict.fromkeys(counts):
        for backward in (after, hopper_in_turn.backward):
            for memory in among_streams(ranks, size, 0, READERS):
                grad = torch.zeros(count, COLUMNS, device="cuda").bfloat16()
                rank = Rank(memory, capacity, attributes, fp8)
                for main in (None, zeros_for(rank)) if adding else (None,):
                    needs = needs_of(attributes) if main is None else NO_MATRIX
                    rank.step(brought(0, count), grad, backward, needs, 0, room, patience=0.05, main=main)
                    torch.cuda.synchronize()
    return [Rank(memory, capacity, attributes, fp8) for memory in among_streams(ranks, size, 0, READERS)]


def needs_of(attributes: dict[str, Any]) -> list[bool]:
    """All that there are."""
    return [True, True, True, True, attributes["gate_up"] == "separate", False, False, False]


def together(
    ranks: Sequence[Rank], counts: Sequence[int], seed: int, backward: Backward = hopper_in_turn.backward, **more: Any
) -> list[dict[str, Tensor]]:
    """What each comes to, on a stream of its own."""
    given = []
    for number, count in enumerate(counts):
        generator = torch.Generator("cuda").manual_seed(seed + number)
        grad = torch.randn(count, COLUMNS, generator=generator, device="cuda").bfloat16()
        given.append((brought(seed + number, count, more.get("dropped", 0.0)), grad))
    needs, room = more.get("needs", needs_of(ranks[0].attributes)), more.get("room")
    main = more.get("main", [None] * len(ranks))
    poison()
    found = []
    for rank, (tokens, grad), each in zip(ranks, given, main, strict=True):
        with torch.cuda.stream(rank.stream):
            found.append(rank.step(tokens, grad, backward, needs, 2 if backward is after else 0, room, main=each))
    torch.cuda.synchronize()
    assert not any(rank.memory.failure() for rank in ranks)
    return found


def off(found: Tensor, right: Tensor) -> float:
    """Relative, in the norm."""
    return float((found.double() - right.double()).norm() / right.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("counts", "attributes", "dropped", "room"),
    [
        ([1024, 1024], SCALED, 0.0, None),
        ([1500, 900], SCALED, 0.3, None),
        ([0, 1024], SCALED, 0.0, None),
        ([1024, 1], WEIGHTED, 0.1, None),
        ([1024, 512, 1000, 0], SCALED, 0.0, 8192),
        ([1024, 1024], GATED | {"output": "out"}, 0.0, None),
        ([1024, 900], SEPARATE, 0.0, None),
        ([1024, 900], INTERLEAVED, 0.0, None),
        ([1024, 900], SINGLE, 0.0, None),
        ([1024, 900], TURNED, 0.0, None),
    ],
    ids=["even", "dropped", "none", "inside", "four", "unweighted", "separate", "interleaved", "single", "turned"],
)
def test_same_bits(counts: list[int], attributes: dict[str, Any], dropped: float, room: int | None, fp8: bool) -> None:
    ranks = ranks_of(counts, attributes, fp8, room)
    for turn in range(2):
        how: dict[str, Any] = {"dropped": dropped, "room": room}
        right = together(ranks, counts, 10 * turn, after, **how)
        for _ in range(2):
            found = together(ranks, counts, 10 * turn, **how)
            for one, other in zip(found, right, strict=True):
                assert one.keys() == other.keys()
                for name in one:
                    assert not one[name].isnan().any(), name
                    assert torch.equal(one[name], other[name]), f"{name} is off by {off(one[name], other[name])}"


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("asked", [("w_in", "w_out"), ("x",), ("weights",), ("x", "w_out"), ("w_in",)], ids=" ".join)
def test_what_is_needed(asked: tuple[str, ...], fp8: bool) -> None:
    counts = [1024, 800]
    ranks = ranks_of(counts, SCALED, fp8)
    every = together(ranks, counts, 3)
    needs = [name in asked for name in ("x", "weights", "w_in", "w_out", "w_up", "b_in", "b_up", "b_out")]
    found = together(ranks, counts, 3, needs=needs)
    for one, other in zip(found, every, strict=True):
        assert {*asked} <= {*one}
        assert all(torch.equal(one[name], other[name]) for name in ("result", *asked))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_main_gradients(fp8: bool) -> None:
    """What kernels add to."""
    counts = [1024, 800]
    ranks = ranks_of(counts, SCALED, fp8, adding=True)
    every = together(ranks, counts, 3)
    main = [{name: each + 0.5 for name, each in zeros_for(rank).items()} for rank in ranks]
    found = together(ranks, counts, 3, needs=NO_MATRIX, main=main)
    for one, other, added in zip(found, every, main, strict=True):
        assert {*one} == {"result", "x", "weights"} and torch.equal(one["x"], other["x"])
        for name, each in added.items():
            assert off(each - 0.5, other[name]) <= 4e-3, name


def test_rows_that_there_is_no_room_for() -> None:
    counts = [1024, 1024]
    ranks = ranks_of(counts, SCALED, False, 64)
    with pytest.raises(AssertionError):
        together(ranks, counts, 0, room=64)
    assert all("assignments met experts of rank" in rank.memory.failure() for rank in ranks)
