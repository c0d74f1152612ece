"""What was refused is named once: the form it resembles, what differed first, where, and the cure if there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moecompile  # noqa: F401  (registers the operators)
from fuzz_graphs import compare
from moecompile.passes.detect import detect
from moecompile.passes.site import NearMiss
from rewriting import rewrite
from zoo_capture import captured, captured_case
from zoo_case import Refusal
from zoo_refusals import REFUSALS

HIDDEN, WIDTH, EXPERTS = 16, 24, 4


class Expert(nn.Module):
    """Mixtral's expert; `between` is what a subclass of `Loop` does to the hidden rows."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(2))
        self.w2 = nn.Linear(WIDTH, HIDDEN, bias=False)


class Loop(nn.Module):
    """Mixtral's loop over experts that are modules of their own."""

    turns = EXPERTS

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def before(self, rows: Tensor) -> Tensor:
        return rows

    def first(self, rows: Tensor, e: int) -> Tensor:
        expert: Any = self.experts[e]
        return expert.w1(rows)

    def between(self, hidden: Tensor) -> Tensor:
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(self.turns):
            token, place = torch.where(ids == e)
            expert: Any = self.experts[e]
            rows = self.before(x[token])
            hidden = self.between(F.silu(self.first(rows, e)) * expert.w3(rows))
            out.index_add_(0, token, expert.w2(hidden) * weights[token, place, None])
        return out


class Normed(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)

    def between(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class NormedBefore(Loop):
    def before(self, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, (HIDDEN,))


class Dropout(Loop):
    def between(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, 0.1, True)


class Dropped(Loop):
    """Mixtral's loop with a dropout that may be the identity."""

    def __init__(self, p: float, training: bool, inplace: bool) -> None:
        super().__init__()
        self.told = (p, training, inplace)

    def between(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, *self.told)


class Adapter(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(HIDDEN, 4, bias=False) for _ in range(EXPERTS))
        self.b = nn.ModuleList(nn.Linear(4, WIDTH, bias=False) for _ in range(EXPERTS))

    def first(self, rows: Tensor, e: int) -> Tensor:
        return super().first(rows, e) + 2.0 * self.b[e](self.a[e](rows))


class Missing(Loop):
    turns = EXPERTS - 1


class StackedNormed(nn.Module):
    """A loop over experts that are slices of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.w2 = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, place = torch.where(ids == e)
            hidden = F.rms_norm(F.silu(x[token] @ self.w1[e]), (WIDTH,))
            out.index_add_(0, token, hidden @ self.w2[e] * weights[token, place, None])
        return out


def misses_of(module: nn.Module) -> tuple[NearMiss, ...]:
    detection = detect(captured(module, (torch.randn(12, HIDDEN),), fullgraph=True).gm.graph)
    assert not detection.sites
    return detection.near_misses


def test_the_loop_itself_is_found() -> None:
    detection = detect(captured(Loop(), (torch.randn(12, HIDDEN),), fullgraph=True).gm.graph)
    assert [site.form for site in detection.sites] == ["expert_loop"] and not detection.near_misses


@pytest.mark.parametrize(
    ("module", "node", "reason"),
    [
        (Normed, "rms_norm", "rms_norm stands between the experts' products and is not elementwise"),
        (StackedNormed, "rms_norm", "rms_norm stands between the experts' products and is not elementwise"),
        (NormedBefore, "layer_norm", "layer_norm is not an operation that detection understands"),
        (Dropout, "dropout", "dropout stands between the experts' products and is random"),
        (Adapter, "linear", "an adapter inside the experts: a product of a product is added to a product"),
        (Missing, "index_add_", "of 4 experts that the ids may name, these add nothing to the sum: 3"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_loop_is_one_near_miss(module: type[nn.Module], node: str, reason: str) -> None:
    (miss,) = misses_of(module())
    assert (miss.form, miss.node, miss.reason) == ("expert_loop", node, reason)
    assert miss.source.startswith("test_near_misses.py:")
    assert ("w + a @ b" in (miss.cure or "")) == (module is Adapter)


@pytest.mark.parametrize(
    ("p", "training", "inplace"),
    [
        *(
            (p, training, inplace)
            for p, training in ((0.0, True), (0, True), (0.3, False))
            for inplace in (False, True)
        ),
        (0.3, True, False),
        (1.0, True, False),
    ],
)
def test_dropout_that_is_the_identity(p: float, training: bool, inplace: bool) -> None:
    known = captured(Dropped(p, training, inplace), (torch.randn(12, HIDDEN),), fullgraph=True)
    detection = detect(known.gm.graph)
    if p > 0 and training:
        assert not detection.sites
        (miss,) = detection.near_misses
        assert miss.reason == "dropout stands between the experts' products and is random"
    else:
        verdict = compare(known.gm, known.inputs, rewrite, (), "dropout")
        assert (verdict.outcome, verdict.sites) == ("equal", 1), verdict.detail


def test_dropout_of_a_module_in_eval_mode() -> None:
    class Model(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def between(self, hidden: Tensor) -> Tensor:
            return self.dropout(hidden)

    assert not detect(captured(Model(), (torch.randn(12, HIDDEN),), fullgraph=True).gm.graph).sites
    assert detect(captured(Model().eval(), (torch.randn(12, HIDDEN),), fullgraph=True).gm.graph).sites


def test_dropout_of_rows_that_are_written_into() -> None:
    class Model(Loop):
        def between(self, hidden: Tensor) -> Tensor:
            F.dropout(hidden, 0.0, True).mul_(0.5)
            return hidden

    known = captured(Model(), (torch.randn(12, HIDDEN),), fullgraph=True)
    verdict = compare(known.gm, known.inputs, rewrite, (), "written")
    assert verdict.outcome == "equal", verdict.detail


def test_every_layer_has_its_own() -> None:
    first, second = misses_of(nn.Sequential(Normed(), Missing()))
    assert first.node == "rms_norm" and "add nothing" in second.reason


class Grouped(nn.Module):
    """Sorted rows in grouped GEMMs; `spelling` says what is done to the hidden rows."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1, self.w2, self.a, self.b = (
            nn.Parameter(torch.randn(EXPERTS, *shape).bfloat16())
            for shape in ((HIDDEN, WIDTH), (WIDTH, HIDDEN), (HIDDEN, 8), (8, WIDTH))
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        order = ids.flatten().argsort(stable=True)
        ends = F.one_hot(ids, EXPERTS).sum((0, 1)).cumsum(0).to(torch.int32)
        rows = x[order // 2].bfloat16()
        h = torch._grouped_mm(rows, self.w1, offs=ends)
        if self.spelling == "adapter":
            h = h + torch._grouped_mm(torch._grouped_mm(rows, self.a, offs=ends), self.b, offs=ends)
        h = {"mask": lambda: h * (h > 0), "int": lambda: h.int().bfloat16()}.get(self.spelling, lambda: F.silu(h))()
        y = torch._grouped_mm(h, self.w2, offs=ends) * weights.flatten()[order, None]
        return torch.zeros_like(x, dtype=y.dtype).index_add(0, order // 2, y)


@pytest.mark.parametrize(
    ("spelling", "node", "part"),
    [("mask", "gt", "gt stands between"), ("int", "to", "cast to"), ("adapter", "grouped_mm", "an adapter inside")],
)
def test_the_operation_is_named(spelling: str, node: str, part: str) -> None:
    (miss,) = misses_of(Grouped(spelling))
    assert (miss.form, miss.node) == ("torchtitan", node) and part in miss.reason
    assert ("w + a @ b" in (miss.cure or "")) == (spelling == "adapter")


@pytest.mark.parametrize(
    "refusal",
    [refusal for refusal in REFUSALS if refusal.control == "loop_control" and not refusal.allowed],
    ids=lambda refusal: refusal.name,
)
def test_a_refused_loop_resembles_a_loop(refusal: Refusal) -> None:
    assert {miss.form for miss in detect(captured_case(refusal).gm.graph).near_misses} == {"expert_loop"}


class Layers(nn.Module):
    """Blocks in layers; its author calls `self` otherwise."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"moe": block}) for block in blocks)

    def forward(me, x: Tensor) -> Tensor:
        for layer in me.layers:
            parts: Any = layer
            x = x + parts["moe"](x)
        return x


def test_paths_are_the_blocks_own() -> None:
    """Not those of an expert, or of the norm in one."""
    detection = detect(captured(Layers(Loop(), Normed()), (torch.randn(12, HIDDEN),), fullgraph=True).gm.graph)
    assert [site.module for site in detection.sites] == ["layers.0.moe"]
    assert [miss.module for miss in detection.near_misses] == ["layers.1.moe"]


def test_the_path_of_the_model_itself_is_empty() -> None:
    assert detect(captured(Loop(), (torch.randn(12, HIDDEN),), fullgraph=True).gm.graph).sites[0].module == ""
    assert misses_of(Normed())[0].module == ""
