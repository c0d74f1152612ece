"""The exchange between nodes, between ranks that are blocks of one launch: every row, every place, every byte sent."""

from __future__ import annotations

import pytest
import torch

from moecompile.runtime.hopper_exchange import Rows
from moecompile.runtime.node_memory import Rings
from moecompile.runtime.topology import Topology

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from nodes_on_one_gpu import Ranks, brought, channels_for, expected_bytes, routed

pytestmark = pytest.mark.gpu

TOPOLOGIES = [(2, 4), (4, 2), (4, 4), (2, 2), (1, 4), (4, 1), (1, 1), (3, 2)]
KINDS = ["random", "limited", "dropped", "last", "first", "nobody"]


def tokens_of(topology: Topology, most: int) -> list[int]:
    """Of each rank: most of them, fewer, one, none."""
    return [(most, most // 3, 1, 0, most - 1)[rank % 5] for rank in range(topology.ranks)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", TOPOLOGIES, ids=[f"{nodes}x{each}" for nodes, each in TOPOLOGIES])
@pytest.mark.parametrize(("columns", "top_k", "dtype"), [(7168, 8, torch.bfloat16), (256, 6, torch.float32)])
def test_every_row(shape: tuple[int, int], columns: int, top_k: int, dtype: torch.dtype, kind: str) -> None:
    topology = Topology(*shape)
    experts, most = 4 * topology.ranks * (4 if topology.ranks < 4 else 1), 300
    rings = Rings(channels_for(topology), ring=2, chunk=4)
    ranks = None
    for turn in range(3):  # words are never cleared
        brings = [
            brought(10 * turn + rank, routed(rank + 100 * turn, tokens, topology, experts, top_k, kind), columns, dtype)
            for rank, tokens in enumerate(tokens_of(topology, most))
        ]
        ranks = ranks or Ranks(topology, rings, experts, most, brings[0])
        found = ranks.exchange(brings)
        ranks.check(brings, found)


@pytest.mark.parametrize("rings", [Rings(2, 1, 1), Rings(1, 1, 32), Rings(4, 8, 3)], ids=str)
def test_rings_of_any_size(rings: Rings) -> None:
    topology, experts, most = Topology(4, 2), 32, 200
    brings = [
        brought(rank, routed(rank, most, topology, experts, 8, "random"), 512, torch.bfloat16)
        for rank in range(topology.ranks)
    ]
    ranks = Ranks(topology, rings, experts, most, brings[0])
    for _ in range(2):
        ranks.check(brings, ranks.exchange(brings))


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [(8, torch.bfloat16), (1024, torch.float16), (1032, torch.bfloat16), (5120, torch.bfloat16), (6144, torch.float32)],
    ids=str,
)
def test_rows_of_any_length(columns: int, dtype: torch.dtype) -> None:
    """Shorter than a piece that is summed at once, as long as one, a little longer; so long that one fits beside."""
    topology, experts, most = Topology(2, 4), 32, 90
    brings = [
        brought(rank, routed(rank, most, topology, experts, 6, "random"), columns, dtype)
        for rank in range(topology.ranks)
    ]
    ranks = Ranks(topology, Rings(channels_for(topology), 2, 4), experts, most, brings[0])
    for _ in range(2):
        ranks.check(brings, ranks.exchange(brings))


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (4, 4)], ids=["2x4", "4x2", "4x4"])
def test_what_is_held_back_and_reordered(shape: tuple[int, int]) -> None:
    """The results are the same, and what travels is what the plan says: between nodes a token once."""
    topology = Topology(*shape)
    experts, most = 4 * topology.ranks, 60
    two = [
        [
            brought(rank + 100 * turn, routed(rank, tokens, topology, experts, 6, "limited"), 512, torch.bfloat16)
            for rank, tokens in enumerate(tokens_of(topology, most))
        ]
        for turn in range(2)
    ]
    ranks = Ranks(topology, Rings(channels_for(topology), 2, 4), experts, most, two[0][0], "faulty")
    pitch = Rows.of(two[0][0].x, two[0][0].ids, two[0][0].weights).pitch
    for turn in range(100):  # rows at a place are not those that were there before
        brings = two[turn % 2]
        found = ranks.there(two[1 - turn % 2])
        sent = ranks.bytes_sent()
        for rank, each in enumerate(found):
            node, rail = divmod(rank, topology.locals)
            others = [other * topology.locals + rail for other in range(topology.nodes) if other != node]
            right = expected_bytes(ranks, each.plan, [found[other].plan.home for other in others], rank, pitch)
            assert torch.equal(sent[rank].near, right.near), (rank, sent[rank].near, right.near)
            assert torch.equal(sent[rank].far, right.far), (rank, sent[rank].far, right.far)
        ranks.check(brings, ranks.exchange(brings))
        ranks.bytes_sent()


def test_the_same_bits_again() -> None:
    topology, experts, most = Topology(2, 4), 64, 512
    brings = [
        brought(rank, routed(rank, most, topology, experts, 8, "random"), 2048, torch.bfloat16)
        for rank in range(topology.ranks)
    ]
    ranks = Ranks(topology, Rings(channels_for(topology)), experts, most, brings[0])
    first = ranks.exchange(brings)
    ranks.check(brings, first)
    for _ in range(20):
        for before, now in zip(first, ranks.exchange(brings), strict=True):
            assert torch.equal(before.sums.values, now.sums.values)


def test_random_routings() -> None:
    """As many as there is patience for: `pytest -m slow` has a thousand."""
    _random_routings(50)


@pytest.mark.slow
def test_a_thousand_random_routings() -> None:
    _random_routings(1000)


def _random_routings(times: int) -> None:
    topology, experts, most = Topology(4, 4), 64, 100
    ranks = None
    for turn in range(times):
        brings = [
            brought(rank, routed(16 * turn + rank, tokens, topology, experts, 4, kind), 256, torch.bfloat16)
            for rank, tokens, kind in (
                (rank, (37 * turn + 11 * rank) % (most + 1), KINDS[(turn + rank) % len(KINDS)])
                for rank in range(topology.ranks)
            )
        ]
        ranks = ranks or Ranks(topology, Rings(channels_for(topology), 2, 2), experts, most, brings[0])
        ranks.check(brings, ranks.exchange(brings))


def test_room_is_given_up_by_all() -> None:
    """A rank that has no room for its rows: everybody's results are NaN, and everybody knows whose fault it was."""
    topology, experts, most = Topology(2, 2), 16, 100
    brings = [
        brought(rank, routed(rank, most, topology, experts, 8, "random"), 512, torch.bfloat16)
        for rank in range(topology.ranks)
    ]
    ranks = Ranks(topology, Rings(channels_for(topology), 2, 4), experts, most, brings[0])
    found = ranks.there(brings)
    found[3].came.copy_(torch.full_like(found[3].came, -1000))
    rows = [Rows(each.rows.values, None, each.rows.weights) for each in found]
    found = ranks.back(found, rows)
    torch.cuda.synchronize()
    assert all(each.sums.values.isnan().all() for each in found)
    for memory in ranks.every:
        assert "rank 3" in memory.failure() and "ep_rows" in memory.failure()
