"""Experts side by side in spellings that no form covers: a near miss with a cure, and none where nothing is chosen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moecompile  # noqa: F401  (registers the operators)
from moecompile.passes.detect import detect
from moecompile.passes.site import Detection
from zoo_capture import captured

HIDDEN, WIDTH, EXPERTS, TOP_K = 16, 24, 4, 2

Forward = Callable[["Mixture", Tensor], Tensor]


class Mixture(nn.Module):
    """A router and experts that are modules of their own; `run` is what a test does with them."""

    def __init__(self, run: Forward, gated: bool = False) -> None:
        super().__init__()
        self.run = run
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Gated() if gated else plain() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    def gates(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        weights, ids = scores.topk(TOP_K)
        return torch.full_like(scores, float("-inf")).scatter(1, ids, weights).softmax(-1)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.ReLU(), nn.Linear(WIDTH, HIDDEN))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(2))
        self.w2 = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def added(model: Mixture, x: Tensor) -> Tensor:
    out, gates = torch.zeros_like(x), model.gates(x)
    for e, expert in enumerate(model.experts):
        out = out + gates[:, e, None] * expert(x)
    return out


def stacked(model: Mixture, x: Tensor) -> Tensor:
    return torch.einsum("te,teh->th", model.gates(x), torch.stack([expert(x) for expert in model.experts], 1))


def masked(model: Mixture, x: Tensor) -> Tensor:
    weights, ids = model.gate(x).softmax(-1).topk(TOP_K)
    out = torch.zeros_like(x)
    for e, expert in enumerate(model.experts):
        mask = (ids == e).any(-1)
        weight = (weights * (ids == e)).sum(-1)
        out[mask] += expert(x[mask]) * weight[mask, None]
    return out


def assigned(model: Mixture, x: Tensor) -> Tensor:
    ids, out = model.gate(x).argmax(-1), torch.zeros_like(x)
    for e, expert in enumerate(model.experts):
        out[ids == e] = expert(x[ids == e])
    return out


def found(model: Mixture) -> Detection:
    return detect(captured(model, (torch.randn(11, HIDDEN),), fullgraph=True).gm.graph)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("run", "form", "cure"),
    [
        (added, "dense", "stack them"),
        (stacked, "dense", "stack them"),
        (masked, "expert_loop", "choose them by number"),
        (assigned, "expert_loop", "choose them by number"),
    ],
)
def test_one_near_miss_with_a_cure(run: Forward, form: str, cure: str, gated: bool) -> None:
    detection = found(Mixture(run, gated))
    (miss,) = detection.near_misses
    assert not detection.sites and miss.form == form
    assert miss.cure is not None and miss.cure.startswith(cure)
    assert miss.source.startswith("test_branches.py:")


def test_the_cure_for_masks_works() -> None:
    def by_number(model: Mixture, x: Tensor) -> Tensor:
        weights, ids = model.gate(x).softmax(-1).topk(TOP_K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(model.experts):
            token, place = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return out

    detection = found(Mixture(by_number))
    assert len(detection.sites) == 1 and not detection.near_misses


def test_the_cure_for_modules_works() -> None:
    def with_stacked_weights(model: Mixture, x: Tensor) -> Tensor:
        experts = list(model.experts)
        first, second = (torch.stack([expert[at].weight for expert in experts]) for at in (0, 2))  # type: ignore[index]
        gates, out = model.gates(x), torch.zeros_like(x)
        for e in range(EXPERTS):
            out = out + gates[:, e, None] * F.linear(F.relu(F.linear(x, first[e])), second[e])
        return out

    detection = found(Mixture(with_stacked_weights))
    assert len(detection.sites) == 1 and not detection.near_misses


def test_layers_side_by_side_are_no_experts() -> None:
    """As many as there are classes, but nothing is chosen; and a choice without anything side by side."""

    def no_choice(model: Mixture, x: Tensor) -> Tensor:
        return sum((expert(x) for expert in model.experts), start=torch.zeros_like(x))

    def no_experts(model: Mixture, x: Tensor) -> Tensor:
        return model.gate(x).topk(TOP_K).indices.to(x.dtype) @ x[:TOP_K]

    for run in (no_choice, no_experts):
        assert not found(Mixture(run)).near_misses
