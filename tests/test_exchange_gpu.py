"""The exchange's kernels between ranks that are streams of one GPU: every row, every place, again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moecompile.runtime import hopper_exchange as kernels
from moecompile.runtime.exchange import exchange_plan
from moecompile.runtime.hopper_exchange import Exchange, Rows
from moecompile.runtime.peer_memory import PeerMemory, among_streams, room_for

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

SMS, DISPATCH, COMBINE = 8, 0, 1
STEPS = 4
MULTIPROCESSORS = 132


def readers(ranks: int) -> int:
    """Blocks of each rank that read: all of them and all that send have a multiprocessor for themselves.

    Who sends needs all of a multiprocessor's shared memory, and with other work beside, streams begin in any order.
    """
    return MULTIPROCESSORS // ranks - SMS


@dataclass(frozen=True)
class Brought:
    """What a rank brings."""

    x: Tensor
    ids: Tensor
    weights: Tensor


def brought(seed: int, tokens: int, columns: int, experts: int, top_k: int, dtype: torch.dtype, kind: str) -> Brought:
    """Random tokens and their experts."""
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator, device="cuda")
    ids = scores.topk(top_k, 1).indices
    if kind == "dropped":
        ids = torch.where(torch.rand(ids.shape, generator=generator, device="cuda") < 0.4, -1, ids)
    if kind == "last":
        ids = torch.arange(experts - top_k, experts, device="cuda").expand(tokens, top_k).contiguous()
    if kind == "nobody":
        ids = torch.full_like(ids, -1)
    x = torch.randn(tokens, columns, generator=generator, device="cuda").to(dtype)
    return Brought(x, ids, torch.rand(tokens, top_k, generator=generator, device="cuda"))


def pitch_of(columns: int, dtype: torch.dtype, top_k: int) -> int:
    """Of a row with its experts and weights."""
    return kernels.pitch_of(columns, dtype, torch.zeros(1, top_k, dtype=torch.int32), torch.zeros(1, top_k))


class Ranks:
    """All ranks, each with a stream of its own."""

    def __init__(self, every: Sequence[PeerMemory], experts: int, capacity: int) -> None:
        self.every, self.experts, self.here = every, experts, experts // len(every)
        self.capacity = capacity
        self.streams = [torch.cuda.Stream() for _ in every]

    def exchange(self, brings: Sequence[Brought]) -> list[tuple[Tensor, ...]]:
        """Of each rank what it received, and its sums when all rows came back, scaled by (rank + 1) / 4.

        One step of all ranks after the other, so that no kernel waits for what has not been launched: PyTorch's
        allocator and the loading of kernels may wait for the device.
        """
        torch.cuda.synchronize()  # what they bring was made on another stream
        steps = [self.steps(memory, mine) for memory, mine in zip(self.every, brings, strict=True)]
        found: list[tuple[Tensor, ...]] = []
        for _ in range(STEPS):
            found = []
            for stream, each in zip(self.streams, steps, strict=True):
                with torch.cuda.stream(stream):
                    found.append(next(each))
        torch.cuda.synchronize()
        return found

    def steps(self, memory: PeerMemory, mine: Brought) -> Iterator[tuple[Tensor, ...]]:
        """Of one rank: what there is after each."""
        ranks, capacity = memory.ranks, self.capacity
        sent, home = kernels.plan(mine.ids, self.experts, ranks, capacity)
        given = Rows.of(mine.x, mine.ids, mine.weights)
        into, came = given.room(ranks * capacity), sent.new_empty(ranks)
        there, back_again = (Exchange(memory, slot, capacity, SMS, 20.0) for slot in (DISPATCH, COMBINE))
        kernels.send(there, given, sent, None)
        yield sent, home
        kernels.receive(there, given, sent, into, came, self.here)
        assert into.ids is not None and into.weights is not None
        back = Rows((into.values.float() * (memory.rank + 1) / 4).to(mine.x.dtype), None, into.weights * 2)
        sums = back.room(len(home))
        yield into.values, into.ids
        kernels.send(back_again, back, None, came)
        yield (back.values,)
        kernels.home(back_again, home, back, sums)
        assert sums.weights is not None
        yield sent, home, into.values, into.ids, into.weights, came, sums.values, sums.weights

    def check(self, brings: Sequence[Brought]) -> None:
        """Every bit of an exchange."""
        found, ranks = self.exchange(brings), len(self.every)
        assert not any(memory.failure() for memory in self.every), self.every[0].failure()
        capacity = self.capacity
        for rank, (mine, (sent, home, *_, sums, of_weights)) in enumerate(zip(brings, found, strict=True)):
            right = exchange_plan(mine.ids.cpu(), num_experts=self.experts, ranks=ranks, capacity=capacity)
            assert torch.equal(sent.cpu(), right[0]) and torch.equal(home.cpu(), right[1]), rank
            total, times = torch.zeros_like(mine.x, dtype=torch.float32), torch.zeros_like(mine.weights)
            for other in range(ranks):
                meets = home[:, other] >= 0
                part = (mine.x.float() * (other + 1) / 4).to(mine.x.dtype).float()
                total += torch.where(meets[:, None], part, 0)
                times += torch.where(meets[:, None], 2 * mine.weights, 0)
            assert torch.equal(sums, total.to(mine.x.dtype)) and torch.equal(of_weights, times), rank
        for rank, (_, _, rows, ids, weights, came, _, _) in enumerate(found):
            for other, mine in enumerate(brings):
                token = found[other][0].view(ranks, capacity)[rank]
                token = token[token >= 0].long()
                count = len(token)
                assert int(came[other]) == count
                here = slice(other * capacity, other * capacity + count)
                assert torch.equal(rows[here], mine.x[token]), (rank, other)
                local = mine.ids[token] - rank * self.here
                local = torch.where((local >= 0) & (local < self.here), local, -1)
                assert torch.equal(ids[here], local.int()) and torch.equal(weights[here], mine.weights[token])
                rest = slice(here.stop, (other + 1) * capacity)
                assert bool((ids[rest] == -1).all()) and not weights[rest].any()


@pytest.mark.parametrize("kind", ["random", "dropped", "last", "nobody"])
@pytest.mark.parametrize(
    ("ranks", "tokens", "columns", "experts", "top_k", "dtype"),
    [
        (1, [300], 512, 8, 2, torch.bfloat16),
        (2, [512, 512], 7168, 16, 8, torch.bfloat16),
        (4, [0, 1, 700, 64], 2048, 64, 6, torch.float16),
        (8, [130] * 8, 256, 64, 8, torch.float32),
    ],
)
def test_every_row(
    ranks: int, tokens: list[int], columns: int, experts: int, top_k: int, dtype: torch.dtype, kind: str
) -> None:
    capacity = max(tokens)
    pitch = pitch_of(columns, dtype, top_k)
    mine = brought(0, 8, columns, experts, top_k, dtype, kind)
    assert kernels.takes(mine.x, mine.ids, mine.weights, ranks)
    group = Ranks(among_streams(ranks, room_for(ranks, capacity, pitch), 0, readers(ranks)), experts, capacity)
    for memory in group.every:  # what was there before is NaN
        memory.own[-4 * memory.room :].fill_(0x7F)
    for turn in range(4):
        group.check([brought(10 * turn + r, tokens[r], columns, experts, top_k, dtype, kind) for r in range(ranks)])


def test_a_thousand_routings() -> None:
    """Slots are used again and again, while ranks are at different places."""
    ranks, experts, top_k, columns, capacity = 4, 32, 4, 256, 96
    pitch = pitch_of(columns, torch.bfloat16, top_k)
    group = Ranks(among_streams(ranks, room_for(ranks, capacity, pitch), 0, readers(ranks)), experts, capacity)
    generator = torch.Generator().manual_seed(0)
    for turn in range(250):
        tokens = torch.randint(0, capacity + 1, (ranks,), generator=generator).tolist()
        group.check(
            [
                brought(turn * ranks + r, tokens[r], columns, experts, top_k, torch.bfloat16, "random")
                for r in range(ranks)
            ]
        )


def test_ranks_that_wait_for_each_other() -> None:
    """All steps of all ranks at once, from captured graphs, some later than others: kernels wait for kernels."""
    ranks, experts, top_k, columns, capacity = 4, 32, 4, 512, 200
    pitch = pitch_of(columns, torch.bfloat16, top_k)
    every = among_streams(ranks, room_for(ranks, capacity, pitch), 0, readers(ranks))
    group = Ranks(every, experts, capacity)
    brings = [brought(r, capacity - 7 * r, columns, experts, top_k, torch.bfloat16, "random") for r in range(ranks)]
    right = group.exchange(brings)
    graphs, found = [], []
    for memory, mine in zip(group.every, brings, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            *_, last = group.steps(memory, mine)
        graphs.append(graph)
        found.append(last)
    for turn in range(20):
        for each in found:
            for tensor in each[2:]:
                tensor.fill_(-7)
        torch.cuda.synchronize()
        for number in range(ranks):
            rank = (number + turn) % ranks
            with torch.cuda.stream(group.streams[rank]):
                if turn % 3 == 1:
                    torch.cuda._sleep(1_000_000 * number)
                graphs[rank].replay()
        torch.cuda.synchronize()
        for one, other in zip(found, right, strict=True):
            assert torch.equal(one[-2], other[-2]) and torch.equal(one[-1], other[-1]) and torch.equal(one[5], other[5])
            assert torch.equal(one[3], other[3])


def test_a_rank_that_does_not_come() -> None:
    """The others give up in time, their results are NaN, later exchanges end at once, and it is known who gave up."""
    experts, columns, top_k = 8, 256, 2
    pitch = pitch_of(columns, torch.bfloat16, top_k)
    every = among_streams(2, room_for(2, 64, pitch), 0)
    mine = brought(0, 64, columns, experts, top_k, torch.bfloat16, "random")
    sent, home = kernels.plan(mine.ids, experts, 2, 64)
    given = Rows.of(mine.x, mine.ids, mine.weights)
    for _ in range(3):
        into, came, sums = given.room(128), sent.new_empty(2), Rows(torch.empty_like(mine.x))
        there, back = (Exchange(every[0], slot, 64, SMS, 0.3) for slot in (DISPATCH, COMBINE))
        kernels.send(there, given, sent, None)
        kernels.receive(there, given, sent, into, came, 4)
        kernels.send(back, Rows(into.values), None, came)
        kernels.home(back, home, Rows(into.values), sums)
        assert bool(sums.values.isnan().all()) and into.ids is not None
        assert bool((into.ids.view(2, 64, top_k)[1] == -1).all()) and not came[1]
    torch.cuda.synchronize()
    assert (
        every[0]
        .failure()
        .startswith("rank 0 of 2 has waited too long for rank 1 (dispatch 0, until that rank's tokens")
    )
    assert not every[1].failure()
    kernels.home(Exchange(every[1], COMBINE, 64, SMS, 0.3), home, Rows(into.values), sums)
    torch.cuda.synchronize()
    assert every[1].failure() == every[0].failure()


def test_a_rank_that_has_left_an_exchange_in_its_middle() -> None:
    """It does not take that one's rows for those of the next, and everybody knows."""
    pitch = pitch_of(256, torch.bfloat16, 2)
    every = among_streams(2, room_for(2, 64, pitch), 0)
    mine = brought(0, 64, 256, 8, 2, torch.bfloat16, "random")
    sent, _ = kernels.plan(mine.ids, 8, 2, 64)
    given, there = Rows.of(mine.x, mine.ids, mine.weights), Exchange(every[0], DISPATCH, 64, SMS, 5.0)
    kernels.send(there, given, sent, None)
    torch.cuda.synchronize()
    assert not every[0].failure()
    kernels.send(there, given, sent, None)
    into, came = given.room(128), sent.new_empty(2)
    kernels.receive(there, given, sent, into, came, 4)
    torch.cuda.synchronize()
    assert every[0].failure().startswith("rank 0 of 2 has left dispatch 0 in its middle: something failed on it")
    assert not came.any()


def test_rows_of_experts_that_do_not_come() -> None:
    """Each row goes to all of its experts' rows; NaN goes to those of one that experts expect, and nobody has sent."""
    every = among_streams(2, room_for(2, 64, 512), 0)
    x = torch.randn(64, 256, device="cuda").bfloat16()
    sent = torch.full((2, 64), -1, dtype=torch.int32, device="cuda")
    sent[0, :40] = torch.arange(40, device="cuda", dtype=torch.int32)
    slots = torch.full((128, 2), -1, dtype=torch.int32, device="cuda")
    slots[:40, 0] = torch.arange(40, device="cuda", dtype=torch.int32).flip(0)
    slots[:20, 1] = 40 + torch.arange(20, device="cuda", dtype=torch.int32)
    slots[64:70, 1] = 60 + torch.arange(6, device="cuda", dtype=torch.int32)
    slots[50, 0] = 66  # a place of this rank's that has no token
    there, into = Exchange(every[0], DISPATCH, 64, SMS, 0.3), Rows(torch.full((70, 256), 7.0, device="cuda").bfloat16())
    kernels.send(there, Rows(x), sent.view(-1), None)
    kernels.receive(there, Rows(x), sent.view(-1), into, sent.new_empty(2), 1, slots)
    torch.cuda.synchronize()
    found = into.values
    assert torch.equal(found[:40], x[:40].flip(0)) and torch.equal(found[40:60], x[:20])
    assert bool(found[60:67].isnan().all()) and bool((found[67:] == 7).all())
    assert "rank 0 of 2 has waited too long for rank 1" in every[0].failure()
