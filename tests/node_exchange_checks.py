"""Checks of the exchange between nodes over collectives, among ranks that are told to be on several nodes."""

from __future__ import annotations

import os
from unittest import mock

import torch
from torch import Tensor, distributed

import expert_parallel_checks
import moecompile
import quantized_travel_checks
import token_exchange_checks
from expert_parallel_models import EXPERTS, Block, compiled, mesh_of, tokens_of
from moecompile.runtime.collectives import wide
from moecompile.runtime.topology import topology_of

ON_TWO_NODES = {"LOCAL_WORLD_SIZE": "2"}
CAPACITY, HIDDEN, TOP_K = 24, 16, 3
GROUPS = 1
"""That a router chooses."""


def _where(ranks: int, slot: int) -> dict[str, object]:
    group = distributed.group.WORLD
    assert group is not None
    return {"ranks": ranks, "group": group.group_name, "capacity": CAPACITY, "slot": slot, "sms": 1, "patience": 1.0}


def _brought(rank: int, turn: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts, some of none, and weights; none at all on a rank in turn."""
    generator = torch.Generator().manual_seed(100 * turn + rank)
    tokens = 0 if rank == turn else 5 + (7 * rank + 3 * turn) % (CAPACITY - 5)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :TOP_K]
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, -1, ids)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    return x, ids, torch.rand(tokens, TOP_K, generator=generator)


def _there(rank: int, ranks: int, brought: tuple[Tensor, Tensor, Tensor], experts: int) -> tuple[Tensor, ...]:
    x, ids, weights = brought
    ops = torch.ops.moecompile
    plan = ops.exchange_plan(ids, num_experts=experts, ranks=ranks, capacity=CAPACITY)
    given = (x, ids, weights, *plan)
    where = _where(ranks, 0)
    rows = ops.dispatch_wait(*ops.dispatch_start(*given, **where), *given, num_experts=experts, **where)
    return (*plan, *rows)


def _became(rank: int, rows: Tensor) -> Tensor:
    return (rows.float() * (rank + 1) / 3).to(rows.dtype)


def check_every_row(rank: int, ranks: int) -> None:
    """Rows, experts and weights lie as they would had they come directly; sums are those of two levels, to the bit."""
    experts, ops = 4 * ranks, torch.ops.moecompile
    for turn, dtype in enumerate((torch.bfloat16, torch.float32, torch.float64, torch.bfloat16)):
        mine = _brought(rank, turn, experts, dtype)
        direct = _there(rank, ranks, mine, experts)
        with mock.patch.dict(os.environ, ON_TWO_NODES):
            topology = topology_of(str(_where(ranks, 0)["group"]), ranks)
            assert topology.is_hierarchical and topology.nodes == ranks // 2
            sent, home, rows, ids, weights, came = _there(rank, ranks, mine, experts)
            assert all(torch.equal(a, b) for a, b in zip(direct[:5], (sent, home, rows, ids, weights), strict=True))
            assert torch.equal(came[:ranks], direct[5])
            y, where = _became(rank, rows), _where(ranks, 1)
            begun = ops.combine_start(y, weights * 2, came, sent, home, **where)
            sums, of_weights = ops.combine_wait(*begun, y, weights * 2, sent, home, **where)
        x, _, given = mine
        total = torch.zeros(x.shape, dtype=wide(dtype))
        times = torch.zeros_like(given)
        for node in range(topology.nodes):
            part, part_times = torch.zeros_like(total), torch.zeros_like(times)
            for other in topology.neighbours(node * topology.locals):
                has = home[:, other, None] >= 0
                part += torch.where(has, _became(other, x), 0)
                part_times += torch.where(has, 2 * given, 0)
            total += part if rank in topology.neighbours(node * topology.locals) else part.to(dtype).to(total.dtype)
            times += part_times
        assert torch.equal(sums, total.to(dtype)) and torch.equal(of_weights, times)


def check_what_crosses_the_network(rank: int, ranks: int) -> None:
    """A record for each node, and not a row for each rank: half as many, where a node has two ranks."""
    experts, sent, real = 4 * ranks, [0, 0], torch.ops._c10d_functional.all_to_all_single
    mine = _brought(rank, 9, experts, torch.float32)

    def counted(rows: Tensor, into: list[int], parts: list[int], group: str) -> Tensor:
        if rows.dtype == torch.float32 and rows.shape[1] == HIDDEN:
            sent[os.environ.get("LOCAL_WORLD_SIZE") == "2"] += sum(
                count for other, count in enumerate(parts) if other // 2 != rank // 2
            )
        return real(rows, into, parts, group)

    with mock.patch.object(torch.ops._c10d_functional, "all_to_all_single", counted):
        _there(rank, ranks, mine, experts)
        with mock.patch.dict(os.environ, ON_TWO_NODES):
            _there(rank, ranks, mine, experts)
    assert sent == [(ranks - 2) * CAPACITY, (ranks // 2 - 1) * CAPACITY], sent


def _on_two_nodes(module: object, name: str, rank: int, ranks: int) -> None:
    with mock.patch.dict(os.environ, ON_TWO_NODES):
        getattr(module, name)(rank, ranks)


def check_compiled_blocks(rank: int, ranks: int) -> None:
    _on_two_nodes(expert_parallel_checks, "check_compiled_exchanges_tokens", rank, ranks)


def check_a_rank_without_tokens(rank: int, ranks: int) -> None:
    _on_two_nodes(expert_parallel_checks, "check_a_rank_without_tokens", rank, ranks)


def check_under_inductor(rank: int, ranks: int) -> None:
    """What was compiled for one node, of the same graph, is not taken for two."""
    expert_parallel_checks.check_under_inductor(rank, ranks)
    torch._dynamo.reset()
    _on_two_nodes(expert_parallel_checks, "check_under_inductor", rank, ranks)


class Grouped(Block):
    """Its router chooses one of four groups of experts."""

    def forward(self, x: Tensor, routed_by: Tensor | None = None) -> Tensor:
        """As DeepSeek-V3 does."""
        scores = self.router(x).float().sigmoid()
        groups = scores.view(-1, 4, EXPERTS // 4).amax(-1).topk(GROUPS, -1).indices
        others = torch.ones(len(x), 4, dtype=torch.bool, device=x.device).scatter(1, groups, False)
        weights, ids = scores.masked_fill(others.repeat_interleave(EXPERTS // 4, 1), float("-inf")).topk(2, -1)
        result: Tensor = self.experts(x, ids, weights)
        return result


def check_the_report_says_what_crosses(rank: int, ranks: int) -> None:
    with mock.patch.dict(os.environ, ON_TWO_NODES):
        for model, words in (
            (Block(), "its router may choose any experts"),
            (Grouped(), f"its router chooses {GROUPS} of 4 groups of experts"),
        ):
            moecompile.shard_experts(model, mesh_of(ranks))
            moecompile.reset()
            compiled(model)(tokens_of(rank, 5))
            (graph,) = moecompile.last_report().graphs
            (said,) = [note for note in graph.notes if "nodes" in note]
            assert said == (
                f"{ranks // 2} nodes of 2 ranks: a token crosses to 1 other node at most ({words}), and is on 2 ranks "
                f"at most; {2 * expert_parallel_checks.HIDDEN} bytes each, and as many back"
            ), said


def check_exchanges_of_models(rank: int, ranks: int) -> None:
    _on_two_nodes(token_exchange_checks, "check_repeated_segments", rank, ranks)


def check_quantized_travel(rank: int, ranks: int) -> None:
    _on_two_nodes(quantized_travel_checks, "check_same_numbers", rank, ranks)


def check_ranks_that_take_nodes_to_be_others(rank: int, ranks: int) -> None:
    """They would send each other something else than the other expects."""
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "2" if rank else "4"}):
        try:
            expert_parallel_checks.check_compiled_exchanges_tokens(rank, ranks)
        except Exception as error:
            assert "rank 0 takes them to be [0, 0, 0, 0]" in str(error) and "LOCAL_WORLD_SIZE" in str(error), error
        else:
            raise AssertionError("nobody has noticed")


def check_training_in_one_operator(rank: int, ranks: int) -> None:
    """The last one: its module changes what a pass does, for the rest of a process."""
    import exchanged_training_checks

    for name in ("check_same_numbers", "check_fakes"):
        _on_two_nodes(exchanged_training_checks, name, rank, ranks)
