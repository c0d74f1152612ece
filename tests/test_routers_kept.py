"""Layers that decide something stay in their precision, however they are written and wherever their results go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import moecompile

HIDDEN, INNER, EXPERTS, TOKENS = 256, 128, 16, 256


class Model(nn.Module):
    """Linear layers by name, each with its features in and out; `forward` is `run`."""

    def __init__(self, run: Callable[..., Any], **sizes: tuple[int, int]) -> None:
        super().__init__()
        self.run = run
        for name, (k, n) in sizes.items():
            self.add_module(name, nn.Linear(k, n, bias=False, dtype=torch.bfloat16))

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def kept(model: nn.Module, *inputs: Tensor, **options: Any) -> dict[str, str | None]:
    """Why each linear layer is kept, by module; None of those that are cast."""
    torch._dynamo.reset()
    moecompile.reset()
    chosen = {"precision": "fp8", "lowering": "eager", **options}
    torch.compile(model, backend="moecompile", options=chosen)(*inputs)
    rows = [row for graph in moecompile.last_report().graphs for row in graph.casts if row.kind == "linear"]
    return {row.module: None if row.cast else row.reason for row in rows}


def tokens() -> Tensor:
    return torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)


def two_best(scores: Tensor) -> Tensor:
    return scores.float().softmax(-1).topk(2).indices


# what decides, as functions of a model and its input -> the layers it is made of
DECIDING: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, int]]]] = {
    "a residual inside": (
        lambda m, x: two_best((z := m.first(x)) + m.second(z)),
        {"first": (HIDDEN, 128), "second": (128, 128)},
    ),
    "several layers": (
        lambda m, x: two_best(m.third(m.second(m.first(x).relu()).relu())),
        {"first": (HIDDEN, 128), "second": (128, 128), "third": (128, EXPERTS)},
    ),
    "gated": (
        lambda m, x: two_best(m.out(functional.silu(m.gate(x)) * m.up(x))),
        {"gate": (HIDDEN, 128), "up": (HIDDEN, 128), "out": (128, EXPERTS)},
    ),
    "by angles": (
        lambda m, x: two_best(functional.normalize(m.query(x)) @ functional.normalize(m.key(x)).mT),
        {"query": (HIDDEN, 128), "key": (HIDDEN, 128)},
    ),
    "checkpointed": (
        lambda m, x: two_best(checkpoint(m.router, x, use_reentrant=False)),
        {"router": (HIDDEN, EXPERTS)},
    ),
    "ids from elsewhere": (
        lambda m, x: m.router(x).sigmoid().gather(-1, torch.arange(2).expand(len(x), 2)),
        {"router": (HIDDEN, EXPERTS)},
    ),
    "picked along a dimension": (
        lambda m, x: torch.take_along_dim(m.router(x), torch.arange(2).expand(len(x), 2), dim=1),
        {"router": (HIDDEN, EXPERTS)},
    ),
    "picked by an index": (
        lambda m, x: m.router(x)[torch.arange(len(x)), torch.arange(len(x)) % EXPERTS],
        {"router": (HIDDEN, EXPERTS)},
    ),
}


@pytest.mark.parametrize("name", DECIDING)
def test_what_decides_is_kept(name: str) -> None:
    run, sizes = DECIDING[name]
    found = kept(Model(lambda m, x: (run(m, x), m.other(x)), other=(HIDDEN, HIDDEN), **sizes), tokens())
    assert found.pop("other") is None
    assert found.keys() == sizes.keys() and all(str(reason).startswith("it feeds ") for reason in found.values()), found


OTHERS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, int]]]] = {
    "rows that are chosen from": (
        lambda m, x: (h := m.inner(x), two_best(m.router(h)), m.other(h)),
        {"inner": (HIDDEN, HIDDEN), "router": (HIDDEN, EXPERTS), "other": (HIDDEN, HIDDEN)},
    ),
    "behind a norm": (
        lambda m, x: two_best(m.router(functional.rms_norm(m.inner(x), (HIDDEN,)))),
        {"inner": (HIDDEN, HIDDEN), "router": (HIDDEN, EXPERTS)},
    ),
    "behind a norm that is written out": (
        lambda m, x: two_best(m.router((h := m.inner(x)) * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())),
        {"inner": (HIDDEN, HIDDEN), "router": (HIDDEN, EXPERTS)},
    ),
    "behind a residual": (
        lambda m, x: two_best(m.router(x + m.inner(x))),
        {"inner": (HIDDEN, HIDDEN), "router": (HIDDEN, EXPERTS)},
    ),
    "rows that are picked whole": (
        lambda m, x: (two_best(m.router(x)), m.inner(x)[torch.arange(8)]),
        {"inner": (HIDDEN, HIDDEN), "router": (HIDDEN, EXPERTS)},
    ),
    "positions picked from a product": (
        lambda m, x: ((m.inner(x) @ x.mT).gather(-1, torch.arange(8).expand(len(x), 8)), two_best(m.router(x))),
        {"inner": (HIDDEN, HIDDEN), "router": (HIDDEN, EXPERTS)},
    ),
    "a checkpoint beside the choice": (
        lambda m, x: (two_best(m.router(x)), checkpoint(m.inner, x, use_reentrant=False)),
        {"inner": (HIDDEN, HIDDEN), "router": (HIDDEN, EXPERTS)},
    ),
    "before a checkpointed router": (
        lambda m, x: (h := m.inner(x), two_best(checkpoint(m.router, h, use_reentrant=False))),
        {"inner": (HIDDEN, HIDDEN), "router": (HIDDEN, EXPERTS)},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_decide_is_cast(name: str) -> None:
    run, sizes = OTHERS[name]
    found = kept(Model(run, **sizes), tokens())
    assert found == {**dict.fromkeys(sizes), "router": "it feeds topk"}


class Scored(nn.Module):
    """A block of experts that is a near miss, for it norms its rows; routing values come from the layer before, too."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False, dtype=torch.bfloat16)
        self.w_in = nn.Parameter((torch.randn(EXPERTS, INNER, HIDDEN) / 16).bfloat16())
        self.w_out = nn.Parameter((torch.randn(EXPERTS, HIDDEN, INNER) / 16).bfloat16())

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        h = functional.rms_norm(x, (HIDDEN,))
        scores = self.router(h) + before
        weights, ids = scores.softmax(-1).topk(2)
        order = ids.flatten().argsort(stable=True)
        offsets = functional.one_hot(ids.flatten(), EXPERTS).sum(0).cumsum(0).to(torch.int32)
        rows = torch._grouped_mm(h[order // 2], self.w_in.mT, offsets)
        rows = torch._grouped_mm(functional.silu(functional.rms_norm(rows, (INNER,))), self.w_out.mT, offsets)
        rows = rows * weights.flatten()[order][:, None]
        return x + torch.zeros_like(x).index_add(0, order // 2, rows), scores


class Stack(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scored(), Scored()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.zeros(TOKENS, EXPERTS, dtype=torch.bfloat16)
        for layer in self.layers:
            x, scores = layer(x, scores)
        return x, scores


def test_routing_values_that_are_handed_on_are_no_residual() -> None:
    assert kept(Stack(), tokens()) == dict.fromkeys(("layers.0.router", "layers.1.router"), "it feeds topk")
    assert moecompile.last_report().near_misses


@pytest.mark.parametrize("words", [1000, HIDDEN], ids=["wide", "as wide as a token"])
def test_a_head_is_kept(words: int) -> None:
    model = Model(lambda m, ids: m.head(m.inner(m.table(ids))), inner=(HIDDEN, HIDDEN), head=(HIDDEN, words))
    model.table = nn.Embedding(words, HIDDEN, dtype=torch.bfloat16)
    found = kept(model, torch.randint(0, words, (64,)))
    assert found == {"inner": None, "head": f"it has as many output features as an embedding has rows, {words}"}


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logsumexp": lambda z, labels: z.logsumexp(-1) - z.gather(-1, labels[:, None]).squeeze(-1),
    "written out": lambda z, labels: (z - z.exp().sum(-1, keepdim=True).log())[torch.arange(len(z)), labels],
    "take_along_dim": lambda z, labels: torch.take_along_dim(z.log_softmax(-1), labels[:, None], -1),
}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_head_is_kept_whose_scores_are_picked_by_labels(name: str, checkpointed: bool) -> None:
    def run(m: Any, x: Tensor, labels: Tensor) -> Tensor:
        scores = checkpoint(m.head, m.inner(x), use_reentrant=False) if checkpointed else m.head(m.inner(x))
        return LOSSES[name](scores.float(), labels).mean()

    found = kept(Model(run, inner=(HIDDEN, HIDDEN), head=(HIDDEN, 512)), tokens(), torch.arange(TOKENS))
    assert found.pop("head") is not None


def test_a_table_that_is_looked_up_by_a_product_is_an_embedding() -> None:
    def run(m: Any, ids: Tensor) -> Tensor:
        h = functional.one_hot(ids, HIDDEN).to(torch.bfloat16) @ m.head.weight
        result: Tensor = m.inner(m.head(m.inner(h)))
        return result

    found = kept(Model(run, inner=(HIDDEN, HIDDEN), head=(HIDDEN, HIDDEN)), torch.arange(64))
    assert found["head"] == "its matrix is an embedding's"
