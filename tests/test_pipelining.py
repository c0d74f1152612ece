"""Pipelines of compiled stages: gradients as those of the model by itself, and what ran as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

import pipelining_checks
from expert_parallel_models import HIDDEN, close
from moecompile import pipeline
from moecompile.bodies import copy_tree
from moecompile.lowering import eager
from moecompile.options import Options
from moecompile.passes import pairs
from moecompile.passes.backward_parts import divide
from moecompile.report import GraphReport
from pipelines_on_one_rank import Routed
from ranks_in_processes import checks_of, judge, run_on_ranks

ON_TWO = (
    "check_pipeline",
    "check_zero_bubble",
    "check_measured",
    "check_some_cannot",
    "check_recomputed",
    "check_inductor",
    "check_compiled_before",
    "check_refusals",
)
ON_FOUR = (
    "check_pipeline",
    "check_pipeline_of_experts",
    "check_experts",
    "check_one_rank_cannot",
)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_on_ranks(2, "pipelining_checks", ON_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_on_ranks(4, "pipelining_checks", ON_FOUR, tmp_path_factory.mktemp("four"))


def test_all_checks_run() -> None:
    assert {*checks_of(pipelining_checks)} == {*ON_TWO, *ON_FOUR}


@pytest.mark.parametrize("name", ON_TWO)
def test_two_ranks(on_two: dict[str, str], name: str) -> None:
    judge(on_two[name])


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks(on_four: dict[str, str], name: str) -> None:
    judge(on_four[name])


class Two(nn.Module):
    """Two layers, of a token's features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.other(self.one(x).relu())
        return result


def graphs_of(model: nn.Module, x: Tensor, **options: Any) -> dict[str, tuple[fx.GraphModule, list[Any], list[Any]]]:
    """Forward and backward graph of a step, with what they were given and gave."""
    found: dict[str, tuple[fx.GraphModule, list[Any], list[Any]]] = {}

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        def keep(kind: str, graph: fx.GraphModule) -> None:
            with unset_fake_temporarily():
                kept = copy_tree(graph)

            def noting(args: list[Any]) -> Any:
                given = [*args]
                result = kept(*given)
                found[kind] = kept, given, list(result)
                return result

            graph.forward = noting

        pipeline.run_passes(gm, Options.parse(None, options), GraphReport.of(gm))
        return eager(gm, inputs, seen=keep)

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    return found


def same(one: Any, right: Any) -> bool:
    return one is right or bool(torch.equal(one, right))


def test_gradients_of_parameters_come_later() -> None:
    backward, given, right = graphs_of(Two(), torch.randn(3, 4, requires_grad=True))["backward"]
    later = [place for place, each in enumerate(right) if each is not None and each.shape != (3, 4)]
    parts = divide(backward, later)
    assert parts is not None and [*parts.later] == later and len(later) == 4
    found = list(parts.first(*given))
    at_once, handed = found[: len(parts.at_once)], found[len(parts.at_once) :]
    second = parts.second(*(given[place] for place in parts.kept), *handed)
    for gradients, places in ((at_once, parts.at_once), (second, parts.later)):
        assert all(same(one, right[place]) for one, place in zip(gradients, places, strict=True))
    products = [sum("mm" in str(node.target) for node in part.graph.nodes) for part in (parts.first, parts.second)]
    assert products == [2, 2]  # each gradient once


@pytest.mark.parametrize("options", [{}, {"precision": "fp8"}, {"recompute": True}], ids=str)
def test_gradients_of_experts_come_later(options: dict[str, Any]) -> None:
    """Those of matrices, up to a rounding; but where each part would compute the hidden rows again."""
    x = torch.randn(40, HIDDEN).bfloat16().requires_grad_()
    backward, given, right = graphs_of(Routed(0), x, **options)["backward"]
    later = [place for place, each in enumerate(right) if each is not None and each.shape != x.shape]
    parts = divide(backward, later)
    again = "recompute" in options
    assert parts is not None and len(later) == 5 and len(parts.later) == (3 if again else 5)
    found = list(parts.first(*given))
    at_once, handed = found[: len(parts.at_once)], found[len(parts.at_once) :]
    second = parts.second(*(given[place] for place in parts.kept), *handed)
    for gradients, places in ((at_once, parts.at_once), (second, parts.later)):
        close(list(gradients), [right[place] for place in places], 0.0 if options else 2**-7)
    assert any("experts" in str(node.target) for node in parts.second.graph.nodes) != again


def test_nothing_is_put_off_that_has_effects() -> None:
    graph = fx.Graph()
    given = graph.placeholder("given")
    given.meta["val"] = torch.empty(4)
    drawn = graph.call_function(torch.ops.aten.rand_like.default, (given,))
    drawn.meta["val"] = torch.empty(4)
    graph.output((given, drawn))
    assert divide(fx.GraphModule(nn.Module(), graph), [1]) is None


def test_pairs_give_what_both_give() -> None:
    found = graphs_of(Two(), torch.randn(3, 4, requires_grad=True))
    (backward, of_backward, back), (forward, of_forward, result) = found["backward"], found["forward"]
    pair = pairs.paired(backward, forward)
    given = [*of_backward, *of_forward]
    for one, right in zip(pair(*given), [*back, *result], strict=True):
        assert same(one, right)
    assert not pairs.obstacle([backward, forward])


def test_symbols_of_two_traces_make_no_pair() -> None:
    """Stages have numbers put in for them first (moecompile/sized_graphs.py)."""
    x = torch.randn(3, 4, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    found = graphs_of(Two(), x)
    assert "sizes that are known only" in pairs.obstacle([found["backward"][0], found["forward"][0]])
