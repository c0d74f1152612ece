"""Ranks of several nodes that share one GPU: an exchange of theirs, and what it has to come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moecompile.runtime import hopper_nodes
from moecompile.runtime.exchange import exchange_plan
from moecompile.runtime.hopper_exchange import Rows
from moecompile.runtime.hopper_nodes import Call, NodeExchange, NodePlan, Passed
from moecompile.runtime.node_memory import RANKS, SMS_OF_A_CHANNEL, Rings, on_one_device, ring_pitch
from moecompile.runtime.topology import Topology
from moecompile.runtime.virtual_nodes import launch_all

MULTIPROCESSORS = 132
WARPS, HELD, HELD_BYTES = 4, 16, 27 * 1024
"""Of a block (node_roles.cuh); puts that a transport holds back, and bytes of each (transport.cuh)."""
ROLES = ("sends to nodes", "passes on", "hands on")
SCRATCH = {"peer": 0, "faulty": HELD * HELD_BYTES + 8 * RANKS, "metered": 16 * len(ROLES)}
"""Bytes of one transport of a warp, of which there are two."""


@dataclass(frozen=True)
class Brought:
    """What a rank brings."""

    x: Tensor
    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Found:
    """What a rank has after an exchange there and back."""

    plan: NodePlan
    rows: Rows
    came: Tensor
    passed: Passed
    sums: Rows


@dataclass(frozen=True)
class Bytes:
    """That a rank sent to each, (ranks,): in its node, and to other nodes."""

    near: Tensor
    far: Tensor


def channels_for(topology: Topology) -> int:
    """As many as all ranks have multiprocessors for at once, and no more than a rank has by default."""
    return max(1, min(10, MULTIPROCESSORS // topology.ranks // SMS_OF_A_CHANNEL))


class Ranks:
    """All ranks, in one launch each time.

    Args:
        topology: of them.
        rings: between nodes.
        experts: of all ranks.
        capacity: tokens of each at most.
        like: what they bring, for its shape.
        through: how they exchange, one of TRANSPORTS.

    Attributes:
        beside: whether what reads runs beside what sends, and not behind it; kernels have to be loaded by then.
    """

    beside = False

    def __init__(
        self, topology: Topology, rings: Rings, experts: int, capacity: int, like: Brought, through: str = "peer"
    ) -> None:
        self.topology, self.experts, self.here, self.capacity = topology, experts, experts // topology.ranks, capacity
        pitch = Rows.of(like.x, like.ids, like.weights).pitch
        self.every = on_one_device(topology, rings, capacity, pitch, 0)
        self.through = through
        blocks = SMS_OF_A_CHANNEL * rings.channels
        size = topology.ranks, blocks * WARPS * 2, SCRATCH[through]
        self.scratch = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.blocks = blocks

    def exchanges(self, slot: int) -> list[NodeExchange]:
        """Of each rank."""
        return [
            NodeExchange(memory, slot, self.capacity, 20.0, None, scratch, self.through, self.through)
            for memory, scratch in zip(self.every, self.scratch, strict=True)
        ]

    def there(self, brings: Sequence[Brought]) -> list[Found]:
        """A dispatch: of each rank what it received."""
        exchanges, found, rows = self.exchanges(0), [], []
        for memory, mine in zip(self.every, brings, strict=True):
            plan = NodePlan.of(mine.ids, self.experts, memory, self.capacity)
            given = Rows.of(mine.x, mine.ids, mine.weights)
            into = given.room(self.topology.ranks * self.capacity)
            into.values.view(torch.uint8).fill_(255)
            came = torch.full((self.topology.ranks,), -7, dtype=torch.int32, device="cuda")
            rows.append(given)
            found.append(Found(plan, into, came, Passed.room(memory, self.capacity), into))
        each = list(zip(exchanges, rows, found, strict=True))
        sends = [hopper_nodes.dispatch(e, r, f.plan, f.passed) for e, r, f in each]
        reads = [hopper_nodes.receive(e, r, f.plan.sent, f.rows, f.came, self.here) for e, r, f in each]
        self._launch(exchanges, sends, reads)
        return found

    def _launch(self, exchanges: Sequence[NodeExchange], sends: Sequence[Call], reads: Sequence[Call]) -> None:
        """Two kernels of all ranks."""
        main = torch.cuda.current_stream()
        other = torch.cuda.Stream() if self.beside else main
        other.wait_stream(main)
        launch_all(exchanges, sends, self.blocks)
        with torch.cuda.stream(other):
            launch_all(exchanges, reads, self.blocks)
        main.wait_stream(other)

    def back(self, found: Sequence[Found], rows: Sequence[Rows]) -> list[Found]:
        """A combine of these rows of each rank."""
        exchanges = self.exchanges(1)
        sums = [r.room(len(f.plan.home)) for r, f in zip(rows, found, strict=True)]
        for each in sums:
            each.values.view(torch.uint8).fill_(255)
        sent = [hopper_nodes.combine(e, r, f.came, f.passed) for e, r, f in zip(exchanges, rows, found, strict=True)]
        home = [
            hopper_nodes.sum_at_home(e, f.plan, r, s) for e, f, r, s in zip(exchanges, found, rows, sums, strict=True)
        ]
        self._launch(exchanges, sent, home)
        return [replace(f, sums=s) for f, s in zip(found, sums, strict=True)]

    def exchange(self, brings: Sequence[Brought]) -> list[Found]:
        """There and back."""
        found = self.there(brings)
        return self.back(found, [became(rank, each.rows) for rank, each in enumerate(found)])

    def bytes_sent(self) -> list[Bytes]:
        """Of each rank, since this was last asked; where transports count."""
        counters = self.scratch[..., HELD * HELD_BYTES :].view(torch.int64)
        totals = counters.view(self.topology.ranks, -1, 2, RANKS)[..., : self.topology.ranks].sum(1)
        counters.zero_()
        return [Bytes(near, far) for near, far in totals.cpu()]

    def check(self, brings: Sequence[Brought], found: Sequence[Found]) -> None:
        """Every bit of an exchange, against what it says of itself."""
        failures = [memory.failure() for memory in self.every]
        assert not any(failures), failures
        right = Right(self.topology, self.experts, self.capacity)
        for rank in range(self.topology.ranks):
            right.check(rank, brings, [each.plan for each in found], found[rank])


@dataclass(frozen=True)
class Right:
    """What an exchange has to come to."""

    topology: Topology
    experts: int
    capacity: int

    def check(self, rank: int, brings: Sequence[Brought], plans: Sequence[NodePlan], found: Found) -> None:
        """Of one rank, every bit."""
        self._check_plan(brings[rank], found.plan)
        self._check_sums(rank, brings[rank], found)
        self._check_rows(rank, brings, plans, found)

    def _check_plan(self, mine: Brought, plan: NodePlan) -> None:
        for of, (sent, home) in (
            (self.topology.ranks, (plan.sent, plan.home)),
            (self.topology.nodes, (plan.node_sent, plan.node_home)),
        ):
            right = exchange_plan(mine.ids.cpu(), num_experts=self.experts, ranks=of, capacity=self.capacity)
            assert torch.equal(sent.cpu(), right[0]) and torch.equal(home.cpu(), right[1])

    def _check_sums(self, rank: int, mine: Brought, found: Found) -> None:
        home = self.topology.locals
        part = {other: (became_of(other, mine.x).float(), 2 * mine.weights) for other in range(self.topology.ranks)}
        total, times = torch.zeros_like(mine.x, dtype=torch.float32), torch.zeros_like(mine.weights)
        for node in range(self.topology.nodes):
            ranks = range(node * home, (node + 1) * home)
            rows = _in_order([torch.where(found.plan.home[:, o, None] >= 0, part[o][0], 0) for o in ranks])
            weights = _in_order([torch.where(found.plan.home[:, o, None] >= 0, part[o][1], 0) for o in ranks])
            total += rows if node == rank // home else rows.to(mine.x.dtype).float()
            times += weights
        assert torch.equal(found.sums.values, total.to(mine.x.dtype)), rank
        assert found.sums.weights is not None
        assert torch.equal(found.sums.weights, times), rank

    def _check_rows(self, rank: int, brings: Sequence[Brought], plans: Sequence[NodePlan], found: Found) -> None:
        rows, ids, weights = found.rows.values, found.rows.ids, found.rows.weights
        here = self.experts // self.topology.ranks
        assert ids is not None and weights is not None
        for other, mine in enumerate(brings):
            token = plans[other].sent.view(self.topology.ranks, self.capacity)[rank]
            token = token[token >= 0].long()
            count = len(token)
            assert int(found.came[other]) == count, (rank, other, int(found.came[other]), count)
            came = slice(other * self.capacity, other * self.capacity + count)
            assert torch.equal(rows[came], mine.x[token]), (rank, other)
            local = mine.ids[token] - rank * here
            local = torch.where((local >= 0) & (local < here), local, -1)
            assert torch.equal(ids[came], local.int()), (rank, other)
            assert torch.equal(weights[came], mine.weights[token]), (rank, other)
            rest = slice(came.stop, (other + 1) * self.capacity)
            assert bool((ids[rest] == -1).all()) and not weights[rest].any()


def became_of(rank: int, x: Tensor) -> Tensor:
    """What a rank's experts, say, make of rows."""
    return (x.float() * (rank + 1) / 4).to(x.dtype)


def became(rank: int, rows: Rows) -> Rows:
    """Of all that it received; rows that never came are not read."""
    assert rows.weights is not None
    return Rows(became_of(rank, rows.values), None, rows.weights * 2)


def expected_bytes(ranks: Ranks, plan: NodePlan, passed: Sequence[Tensor], rank: int, pitch: int) -> Bytes:
    """That a rank sends in a dispatch, as the plans say.

    To other nodes a record for each token that meets experts there, with its places; to ranks of its node each row of
    its own that they have, and of each record that it has passed on.

    Args:
        ranks: all of them.
        plan: of this one.
        passed: `home` of the ranks of this rail on other nodes, whose records it passes on.
        rank: this one.
        pitch: bytes of a row.
    """
    topology = ranks.topology
    node, rail = divmod(rank, topology.locals)
    near, far = torch.zeros(topology.ranks, dtype=torch.int64), torch.zeros(topology.ranks, dtype=torch.int64)
    for other in range(topology.nodes):
        if other != node:
            records = int((plan.node_home[:, other] >= 0).sum())
            far[other * topology.locals + rail] = records * ring_pitch(topology, pitch)
    for neighbour in range(node * topology.locals, (node + 1) * topology.locals):
        rows = sum(int((home[:, neighbour] >= 0).sum()) for home in passed)
        rows += int((plan.home[:, neighbour] >= 0).sum()) if neighbour != rank else 0
        near[neighbour] = rows * pitch
    return Bytes(near, far)


def routed(seed: int, tokens: int, topology: Topology, experts: int, top_k: int, kind: str) -> Tensor:
    """(T, K) ids, at random; `kind`: limited (to two nodes at most), dropped, last, own (the first node), nobody."""
    generator = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator, device="cuda")
    if kind == "limited":
        of_nodes = torch.rand(tokens, topology.nodes, generator=generator, device="cuda").topk(
            min(2, topology.nodes), 1
        )
        chosen = torch.zeros(tokens, topology.nodes, device="cuda").scatter_(1, of_nodes.indices, 1.0)
        scores = scores + chosen.repeat_interleave(experts // topology.nodes, 1)
    ids = scores.topk(top_k, 1).indices
    if kind == "dropped":
        ids = torch.where(torch.rand(ids.shape, generator=generator, device="cuda") < 0.4, -1, ids)
    if kind in ("last", "first"):
        begin = experts - top_k if kind == "last" else 0
        ids = torch.arange(begin, begin + top_k, device="cuda").expand(tokens, top_k).contiguous()
    return torch.full_like(ids, -1) if kind == "nobody" else ids


def brought(seed: int, ids: Tensor, columns: int, dtype: torch.dtype) -> Brought:
    """Random rows with these experts."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(len(ids), columns, generator=generator, device="cuda").to(dtype)
    return Brought(x, ids, torch.rand(ids.shape, generator=generator, device="cuda"))


def _in_order(parts: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total
