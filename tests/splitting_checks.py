"""Graphs of several ranks on two halves of their batch (tests/test_splitting.py)."""

from __future__ import annotations

import copy
import re
import unittest
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile
from expert_parallel_models import Block, close, mesh_of
from moecompile import splitting
from moecompile.passes import hardware
from overlap_checks import NO_ORDER, OLD, SLOW, notes, on

BATCH, LENGTH, FEATURES = 8, 6, 64
SLOWER = replace(SLOW, links={"nvlink": hardware.Link(5e5, 0.0)})
"""On which rows take longer to send than the experts, whose tiles halves fill worse, to multiply."""


class Layer(nn.Module):
    """Attention, and experts beside a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(FEATURES)
        self.qkv, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.block, self.up, self.down = Block(), nn.Linear(FEATURES, 32), nn.Linear(32, FEATURES)

    def forward(self, x: Tensor, routed_by: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        rows = x.reshape(-1, FEATURES)
        y = self.block(rows, routed_by.reshape(-1, FEATURES)) + self.down(F.silu(self.up(rows)))
        return x + y.view(x.shape)


class Model(nn.Module):
    """Two layers, and two outputs. All routers read the input: no rounding decides which experts a token has."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])
        self.bfloat16()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        given = x
        for layer in self.layers:
            x = layer(x, given)
        return x, x.float().mean(-1)


def rows_of(rank: int, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, LENGTH, FEATURES, generator=torch.Generator().manual_seed(rank)).bfloat16()


def compiled(model: nn.Module, device: hardware.Hardware = SLOWER, **options: Any) -> Any:
    """Called, it is compiled as if for that device: on a GPU what is this small has nothing to gain."""
    torch._dynamo.reset()
    splitting.forget()
    options = {"microbatches": 2, "ep_capacity": BATCH * LENGTH, "lowering": "eager", **options}
    run = torch.compile(model, backend="moecompile", fullgraph=True, options=options)
    return lambda x: on(device, lambda: run(x))


def sharded(ranks: int, layers: int = 2) -> tuple[Model, Model]:
    """A model whose experts are spread over ranks, and the same on one."""
    model = Model(layers)
    whole = copy.deepcopy(model)
    moecompile.shard_experts(model, mesh_of(ranks), gradients="sum")
    return model, whole


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def trains(rank: int, ranks: int, layers: int, **options: Any) -> None:
    model, whole = sharded(ranks, layers)
    x, same = (rows_of(rank).requires_grad_() for _ in range(2))
    moecompile.mark_batch(x)
    found = []
    for each, given in ((compiled(model, **options), x), (whole, same)):
        hidden, means = each(given)
        (hidden.float().square().sum() + means.sum()).backward()
        found.append([hidden.detach(), means.detach()])
    assert "microbatches: two halves of the batch" in notes(), notes()
    close(found[0], found[1], 2e-2)
    close([gradient(x)], [gradient(same)], 3e-2)
    graph = moecompile.last_report().graphs[-1]
    assert str(graph.forward).count("= moecompile.dispatch_start(") == 2 * layers, graph.forward


def check_halves_give_what_the_whole_does(rank: int, ranks: int) -> None:
    trains(rank, ranks, 2)


def check_halves_by_inductor(rank: int, ranks: int) -> None:
    if OLD:
        raise unittest.SkipTest(NO_ORDER)
    trains(rank, ranks, 1, lowering="inductor")


def check_halves_are_in_flight_together(rank: int, ranks: int) -> None:
    """In slots of their own, of half the tokens."""
    model, _ = sharded(ranks)
    x = rows_of(rank)
    moecompile.mark_batch(x)
    with torch.no_grad():
        compiled(model)(x)
    graph = str(moecompile.last_report().graphs[-1].forward)
    assert {*re.findall(r"slot=(\d+)", graph)} == {"0", "1", "2", "3"}, graph
    assert {*re.findall(r"capacity=(\d+)", graph)} == {str(BATCH * LENGTH // 2)}, graph
    steps = re.findall(r"= moecompile\.(\w+)_(start|wait)\(.*slot=(\d)", graph)
    flying, together = set[str](), 0
    for _, what, slot in steps:
        (flying.add if what == "start" else flying.remove)(slot)
        together = max(together, len(flying))
    assert together == 2, steps


def check_nothing_to_gain(rank: int, ranks: int) -> None:
    """On a GPU what is so small takes longer in halves."""
    model, whole = sharded(ranks, layers=1)
    x = rows_of(rank)
    moecompile.mark_batch(x)
    with torch.no_grad():
        close([*compiled(model, hardware.named("h200"))(x)], [*whole(x)], 2e-2)
    assert "microbatches: it stays whole: halves would gain too little, predicted of H200 SXM" in notes(), notes()


def check_an_odd_batch_stays_whole(rank: int, ranks: int) -> None:
    model, whole = sharded(ranks, layers=1)
    x = rows_of(rank, 5)
    moecompile.mark_batch(x)
    with torch.no_grad():
        close([*compiled(model)(x)], [*whole(x)], 2e-2)
    assert "microbatches: it stays whole: a batch of 5 has no halves" in notes(), notes()


def check_one_rank_with_an_odd_batch(rank: int, ranks: int) -> None:
    """All stay whole."""
    model, whole = sharded(ranks, layers=1)
    x = rows_of(rank, 5 if rank else 4)
    moecompile.mark_batch(x)
    with torch.no_grad():
        close([*compiled(model)(x)], [*whole(x)], 2e-2)
    assert "microbatches: it stays whole" in notes(), notes()
    assert ("has no halves" in notes()) == bool(rank)
    assert ("others of the ranks" in notes()) == (not rank)


def check_a_batch_that_is_odd_later(rank: int, ranks: int) -> None:
    """All ranks compile once more, and stay whole."""
    model, whole = sharded(ranks, layers=1)
    run = compiled(model)
    with torch.no_grad():
        for batch in (8, 4, 7, 6):
            x = rows_of(rank, batch)
            moecompile.mark_batch(x)
            close([*run(x)], [*whole(x)], 2e-2)
    texts = [" ".join(graph.notes) for graph in moecompile.last_report().graphs]
    assert "it stays whole: a batch of 7" in texts[-1], texts


def check_a_static_batch(rank: int, ranks: int) -> None:
    model, whole = sharded(ranks, layers=1)
    x = rows_of(rank)
    with torch.no_grad():
        close([*compiled(model)(x)], [*whole(x)], 2e-2)
    assert "call moecompile.mark_batch(inputs) before the first call" in notes(), notes()


class Loss(nn.Module):
    """Of all elements; and a statistic of what the first layer gives, in the middle of the graph."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.model.layers[0](x, x)
        seen = hidden.float().mean((0, 1)).square().sum()
        for layer in self.model.layers[1:]:
            hidden = layer(hidden, x)
        return hidden.float().square().mean() + seen


def check_a_loss_and_a_statistic_of_the_batch(rank: int, ranks: int) -> None:
    """They are of the whole batch, and all layers of halves."""
    model, whole = sharded(ranks)
    x, same = (rows_of(rank).requires_grad_() for _ in range(2))
    moecompile.mark_batch(x)
    found, right = compiled(Loss(model))(x), Loss(whole)(same)
    found.backward()
    right.backward()
    close([found], [right], 1e-3)
    close([gradient(x)], [gradient(same)], 3e-2)
    assert "microbatches: two halves of the batch, 2 exchanges of each" in notes(), notes()
    assert "; the rest stays whole: aten.mean.dim goes along the batch; aten.mean.default goes" in notes(), notes()


def check_fp8(rank: int, ranks: int) -> None:
    """Casts are of rows, too: halves have the same numbers."""
    model, _ = sharded(ranks, layers=1)
    x = rows_of(rank)
    found = []
    for count in (1, 2):
        moecompile.mark_batch(x)
        run = compiled(model, precision="fp8", microbatches=count, overlap=True, kernels="reference")
        with torch.no_grad():
            found.append([*run(x)])
    assert "microbatches: two halves of the batch" in notes(), notes()
    close(found[1], found[0], 1e-2)
