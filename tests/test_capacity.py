"""The capacity form: exactly the model's tokens are dropped, and what only looks like it is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import moecompile  # noqa: F401  (registers the operators)
from capacity_modules import EXPERTS, HIDDEN, SPELLINGS, ZERO_WEIGHTS, Spelling
from capacity_near_modules import REASONS, Near
from fuzz_graphs import compare
from moecompile.passes.detect import detect
from rewriting import rewrite
from zoo_capacity import CASES
from zoo_capture import Captured, captured
from zoo_case import Case, arguments, make

TOKENS = 24


def model(kind: type[Spelling], factor: float = 1.0, seed: int = 0) -> tuple[Spelling, Tensor]:
    torch.manual_seed(seed)
    module = kind(factor)
    return module, torch.randn(TOKENS, HIDDEN, dtype=next(module.parameters()).dtype, requires_grad=True)


def routings(known: Captured) -> Iterator[tuple[Any, ...]]:
    """The graph's inputs, and two times others: the graph is the same for every routing."""
    yield known.inputs
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        yield tuple(
            value[torch.randperm(value.shape[0], generator=generator)].detach().requires_grad_(value.requires_grad)
            for value in known.inputs
        )


class _Ids(fx.Interpreter):
    """Runs a graph and keeps the expert ids that the plan is made of."""

    ids: Tensor

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.moecompile.plan.default:
            self.ids = args[0]
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", SPELLINGS, ids=lambda kind: kind.__name__)
def test_spelling(kind: type[Spelling], factor: float) -> None:
    module, x = model(kind, factor)
    known = captured(module, (x,))
    assert [site.form for site in detect(known.gm.graph).sites] == ["capacity"]
    for inputs in routings(known):
        verdict = compare(known.gm, inputs, rewrite, (), kind.__name__)
        assert (verdict.outcome, verdict.sites) == ("equal", 1), verdict.detail


@pytest.mark.parametrize("kind", [kind for kind in SPELLINGS if kind.__name__ != "WeightedBefore"])
def test_drops_the_same_assignments(kind: type[Spelling]) -> None:
    dropped = 0
    for factor in (0.5, 1.0):
        module, x = model(kind, factor)
        known = captured(module, (x,))
        rewrite(known.gm)
        graph = _Ids(known.gm)
        graph.run(*known.inputs)
        shape = (2, TOKENS // 2, HIDDEN) if kind.__name__.startswith("Groups") else x.shape
        marked = module.gating(x.view(shape))[0].flatten(0, -3).sum(-1).to(torch.int64)
        kept = torch.zeros(TOKENS, EXPERTS + 1, dtype=torch.int64)
        kept.scatter_add_(1, graph.ids % (EXPERTS + 1), torch.ones_like(graph.ids))
        assert torch.equal(kept[:, :EXPERTS], marked)
        dropped += int(kept[:, EXPERTS].sum())
    assert dropped > 0


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_zoo_at_other_capacities(case: Case, factor: float) -> None:
    module = make(case)
    for name in ("factor", "slack", "capacity_factor"):
        if hasattr(module, name):
            setattr(module, name, factor)
    known = captured(module, tuple(value.requires_grad_() for value in arguments(case, TOKENS)))
    for inputs in routings(known):
        verdict = compare(known.gm, inputs, rewrite, (), case.name)
        assert (verdict.outcome, verdict.sites) == ("equal", 1), verdict.detail


@pytest.mark.parametrize("kind", ZERO_WEIGHTS, ids=lambda kind: kind.__name__)
def test_weights_of_zero_keep_their_gradient(kind: type[Spelling]) -> None:
    """What the mask of its weight leaves out gives 0, and gets the gradient of what its expert makes of zeros."""
    for factor in (0.5, 2.0):
        module, x = model(kind, factor)
        known = captured(module, (x,))
        (site,) = detect(known.gm.graph).sites
        assert ("sign" in site.input) == kind.biased, site.input
        verdict = compare(known.gm, known.inputs, rewrite, (), kind.__name__)
        assert verdict.outcome == "equal", verdict.detail


@pytest.mark.parametrize("kind", REASONS, ids=lambda kind: kind.__name__)
def test_near_spelling_is_refused(kind: type[Spelling]) -> None:
    module, x = model(kind)
    detection = detect(captured(module, (x,)).gm.graph)
    assert detection.sites == ()
    assert [miss.form for miss in detection.near_misses] == ["capacity"]
    assert REASONS[kind] in detection.near_misses[0].reason


def test_near_spellings_differ_by_one_step() -> None:
    module, x = model(Near)
    known = captured(module, (x,))
    assert [site.form for site in detect(known.gm.graph).sites] == ["capacity"]
    verdict = compare(known.gm, known.inputs, rewrite, (), "Near")
    assert verdict.outcome == "equal", verdict.detail


def test_routing_values_stay_alive() -> None:
    """A load-balancing loss reads masks, counts and the dispatch tensor itself; the block is replaced all the same."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Near()

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            dispatch, combine = self.block.gating(x)
            y = self.block.experts(torch.einsum("tec,tm->ecm", dispatch, x))
            return torch.einsum("tec,ecm->tm", combine, y), dispatch.sum(-1).mean(0), combine.sum((1, 2))

    torch.manual_seed(0)
    known = captured(Model(), (torch.randn(TOKENS, HIDDEN, requires_grad=True),))
    verdict = compare(known.gm, known.inputs, rewrite, (), "loss")
    assert (verdict.outcome, verdict.sites) == ("equal", 1), verdict.detail
