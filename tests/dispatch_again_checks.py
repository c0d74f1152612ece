"""Tokens that the backward has dispatched again, what ranks check together (tests/test_dispatch_again.py)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

import moecompile
from expert_parallel_models import Block, Checkpointed, compiled, mesh_of, results, tokens_of
from moecompile.agreement import DisagreementError
from moecompile.report import GraphReport

CAPACITY = 24


def step(model: nn.Module, x: Tensor, **options: Any) -> tuple[list[Tensor], GraphReport]:
    """Result and gradients, and what was compiled."""
    model.zero_grad(set_to_none=True)
    found = [each.clone() for each in results(compiled(model, ep_capacity=CAPACITY, **options), model, x)]
    return found, moecompile.last_report().graphs[-1]


def held(graph: GraphReport, rows: int, width: int) -> int:
    """How many tensors of such a size are saved for the backward."""
    return len(re.findall(rf"input saved\s*: \w+\[{rows}, {width}\]", str(graph.backward)))


def compare(rank: int, ranks: int, hidden: int = 64, **options: Any) -> None:
    """The same bits, and rows that nobody holds."""
    model, x = Block(hidden, hidden // 2), tokens_of(rank, 6 + 5 * rank, hidden=hidden)
    moecompile.shard_experts(model, mesh_of(ranks))
    right, kept = step(model, x, **options)
    found, again = step(model, x, ep_dispatch_again=True, **options)
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))
    assert held(kept, ranks * CAPACITY, hidden) == 1 and held(again, ranks * CAPACITY, hidden) == 0, again.backward
    for graph, times in ((kept, 1), (again, 2)):
        assert str(graph.backward).count("dispatch_start") == times and str(graph.forward).count("dispatch_start") == 1
    assert "the backward has tokens dispatched again, 1 times" in str(again.notes)


def check_same_numbers(rank: int, ranks: int) -> None:
    compare(rank, ranks)


def check_same_numbers_in_fp8(rank: int, ranks: int) -> None:
    compare(rank, ranks, hidden=256, precision="fp8")


def check_with_recompute_and_recast(rank: int, ranks: int) -> None:
    compare(
        rank, ranks, hidden=256, precision="fp8", recompute=True, fp8_recast_weights=True, fp8_scale_format="float32"
    )


def check_main_gradients(rank: int, ranks: int) -> None:
    """Backwards that add to them are rewritten alike."""
    model, x = Block(), tokens_of(rank, 6 + 5 * rank)
    moecompile.shard_experts(model, mesh_of(ranks))
    sharded: list[Any] = [each for name, each in model.named_parameters() if "w_" in name]
    found = []
    for again in (False, True):
        for each in sharded:
            each.main_grad = torch.zeros(each.to_local().shape)
        run = compiled(model, ep_capacity=CAPACITY, main_grad=True, ep_dispatch_again=again)
        run(x).float().pow(2).sum().backward()
        assert ("dispatched again" in str(moecompile.last_report().graphs[-1].notes)) == again
        found.append([each.main_grad for each in sharded])
    assert all(bool(one.any()) and torch.equal(one, other) for one, other in zip(*found, strict=True))


def check_checkpointed_blocks_stay(rank: int, ranks: int) -> None:
    model, x = Checkpointed(), tokens_of(rank, 6 + 5 * rank)
    moecompile.shard_experts(model, mesh_of(ranks))
    right, before = step(model, x)
    found, after = step(model, x, ep_dispatch_again=True)
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))
    assert after.backward == before.backward and "dispatched again" not in str(after.notes)


def check_ranks_that_were_told_other_things(rank: int, ranks: int) -> None:
    model = Block()
    moecompile.shard_experts(model, mesh_of(ranks))
    said = ""
    try:
        step(model, tokens_of(rank, 6), ep_dispatch_again=rank == 0)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    assert DisagreementError.__name__ in said and "option `ep_dispatch_again`" in said, said
