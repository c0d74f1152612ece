"""Exchanges under Inductor on ranks of very different numbers of tokens (tests/test_exchange_order.py)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile
from expert_parallel_models import Block, close, compiled, meaned, mesh_of, results, tokens_of, with_mean_of_others

MANY = 600
INDUCTOR: dict[str, Any] = {"lowering": "inductor", "ep_capacity": MANY, "inductor": {"fx_graph_cache": False}}


class Residual(nn.Module):
    """A block, and something else that reads what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = Block(), nn.Linear(64, 64, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(F.gelu(x) + self.block(F.gelu(x)))
        return found


class Towers(nn.Module):
    """Two chains of blocks that do not depend on each other; no rounding decides which experts a token has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.linears = nn.ModuleList([nn.Linear(64, 64, dtype=torch.bfloat16) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        sides = [x, x.flip(0)]
        for number, (block, linear) in enumerate(zip(self.blocks, self.linears, strict=True)):
            side = sides[number % 2]
            sides[number % 2] = side + block(F.gelu(linear(side)), x)
        return sides[0].float() * sides[1].float()


class Direct(nn.Module):
    """A block that reads what another gives, and nothing between."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        found: Tensor = second(first(x), x)
        return found


def compare(rank: int, ranks: int, model: nn.Module, tokens: int, training: bool, **options: Any) -> None:
    """With what the whole model computes."""
    whole, x = copy.deepcopy(model), tokens_of(rank, tokens)
    moecompile.shard_experts(model, mesh_of(ranks))
    torch._dynamo.reset()
    run = compiled(model, **(options or INDUCTOR))
    if training:
        right = meaned(results(whole, whole, x), whole)
        close(with_mean_of_others(results(run, model, x), model), right, 2e-2)
        return
    with torch.no_grad():
        close([run(x)], [whole(x)], 2e-2)
    (graph,) = moecompile.last_report().graphs
    assert "gather_experts" not in graph.after


def check_inference_of_a_rank_without_tokens(rank: int, ranks: int) -> None:
    compare(rank, ranks, Residual(), 0 if rank else MANY, training=False)


def check_training_of_a_rank_without_tokens(rank: int, ranks: int) -> None:
    compare(rank, ranks, Residual(), 0 if rank else MANY, training=True)


def check_blocks_that_do_not_depend_on_each_other(rank: int, ranks: int) -> None:
    compare(rank, ranks, Towers(), 7 if rank else MANY, training=False)


def check_training_of_blocks_that_do_not_depend_on_each_other(rank: int, ranks: int) -> None:
    compare(rank, ranks, Towers(), 7 if rank else MANY, training=True)


def check_blocks_that_read_each_other(rank: int, ranks: int) -> None:
    compare(rank, ranks, Direct(), 7 + 5 * rank, training=True, lowering="eager")
