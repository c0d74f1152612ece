"""Rows that travel in FP8, what ranks check together (tests/test_quantized_travel.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import moecompile
from expert_parallel_models import Block, Checkpointed, close, compiled, mesh_of, results, tokens_of
from moecompile import lowering
from moecompile.report import GraphReport

WIDE = 256


def step(model: nn.Module, x: Tensor, **options: Any) -> tuple[list[Tensor], GraphReport]:
    """Result and gradients, and what was compiled."""
    model.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    found = [each.clone() for each in results(compiled(model, precision="fp8", **options), model, x)]
    return found, moecompile.last_report().graphs[-1]


def lines_of(graph: GraphReport) -> tuple[int, int]:
    """How many dispatches the forward and the backward have in FP8."""
    return str(graph.forward).count("moecompile.to_lines"), str(graph.backward).count("moecompile.to_lines")


@contextlib.contextmanager
def as_they_are(wanted: bool) -> Iterator[None]:
    """Rows travel so, if that is wanted."""
    change = mock.patch.object(lowering, "let_rows_travel_quantized", lambda _: 0)
    with change if wanted else contextlib.nullcontext():
        yield


def compare(rank: int, ranks: int, model: nn.Module, expected: tuple[int, int], **options: Any) -> None:
    """The same bits as where rows travel as they are."""
    x = tokens_of(rank, 6 + 5 * rank, hidden=WIDE)
    moecompile.shard_experts(model, mesh_of(ranks))
    with as_they_are(True):
        right, before = step(model, x, **options)
    found, after = step(model, x, **options)
    assert lines_of(before) == (0, 0) and lines_of(after) == expected, (lines_of(after), after.forward)
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


def check_same_numbers(rank: int, ranks: int) -> None:
    compare(rank, ranks, Block(WIDE, 128), (1, 1))


def check_float32_scales(rank: int, ranks: int) -> None:
    compare(rank, ranks, Block(WIDE, 128), (1, 1), fp8_scale_format="float32")


def check_recompute(rank: int, ranks: int) -> None:
    compare(rank, ranks, Block(WIDE, 128), (1, 1), recompute=True)


def check_under_inductor(rank: int, ranks: int) -> None:
    """And what is dispatched again."""
    model, x = Block(WIDE, 128), tokens_of(rank, 6 + 5 * rank, hidden=WIDE)
    moecompile.shard_experts(model, mesh_of(ranks))
    right, _ = step(model, x)
    found, graph = step(model, x, lowering="inductor", ep_dispatch_again=True)
    assert lines_of(graph) == (1, 1) and str(graph.backward).count("dispatch_start") == 2
    close(found, right, 6e-2)


def check_main_gradients(rank: int, ranks: int) -> None:
    """Backwards that add to them read lines, too."""
    model, x = Block(WIDE, 128), tokens_of(rank, 6 + 5 * rank, hidden=WIDE)
    moecompile.shard_experts(model, mesh_of(ranks))
    sharded: list[Any] = [each for name, each in model.named_parameters() if "w_" in name]
    found = []
    for wanted in (True, False):
        torch._dynamo.reset()
        for each in sharded:
            each.main_grad = torch.zeros(each.to_local().shape)
        with as_they_are(wanted):
            compiled(model, precision="fp8", main_grad=True)(x).float().pow(2).sum().backward()
        assert lines_of(moecompile.last_report().graphs[-1]) == ((0, 0) if wanted else (1, 1))
        found.append([each.main_grad for each in sharded])
    assert all(bool(one.any()) and torch.equal(one, other) for one, other in zip(*found, strict=True))


class Biased(nn.Module):
    """Experts with biases, whose second ones have gradients that are sums of the results' gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(WIDE, 128)
        experts: Any = self.block.experts
        experts.b_out = nn.Parameter(torch.randn(len(experts.w_out), WIDE).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """As `Experts` of expert_parallel_models, with the bias."""
        experts: Any = self.block.experts
        weights, ids = self.block.router(x).float().softmax(-1).topk(2, -1)
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=len(experts.w_out)).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(x[order // 2], experts.w_in, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(nn.functional.silu(gate) * up, experts.w_out, offs=ends) + experts.b_out[flat[order]]
        y = y.float() * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, order // 2, y).to(x.dtype)


def check_gradients_of_biases(rank: int, ranks: int) -> None:
    compare(rank, ranks, Biased(), (1, 0))


def check_checkpointed_blocks(rank: int, ranks: int) -> None:
    """Their gradients do, their tokens do not."""
    compare(rank, ranks, Checkpointed(WIDE, 128), (0, 1))
