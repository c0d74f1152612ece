"""Fuzzed graphs: the harness notices false rewrites, and detection makes none."""

from __future__ import annotations

import operator
import random

import pytest
import torch
from torch import fx

from fuzz_graphs import campaign, check, compare, edit
from zoo_capture import Captured, captured_case, copied
from zoo_case import TOKENS
from zoo_forms import CASES, case

SAMPLE = ("sort_histogram", "interleaved_biased", "batched_control", "scattered_infinity", "titan_control")


def nothing(gm: fx.GraphModule) -> int:
    """A rewrite that is right: it changes nothing, and says that it did."""
    return 1


def larger(gm: fx.GraphModule) -> int:
    """A rewrite that is wrong by three tenths in the value of the last multiplication."""
    node = [node for node in gm.graph.nodes if node.target in (operator.mul, "mul")][-1]
    with gm.graph.inserting_after(node):
        scaled = gm.graph.call_function(operator.mul, (node, 1.3))
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    return 1


def forgets_writes(gm: fx.GraphModule) -> int:
    """A rewrite that drops the bias which is added in place."""
    for node in [node for node in gm.graph.nodes if node.target == "add_"]:
        gm.graph.erase_node(node)
    return 1


def raises(gm: fx.GraphModule) -> int:
    raise KeyError("a role without a node")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_right_rewrite_passes(name: str) -> None:
    graph = captured_case(case(name))
    assert compare(graph.gm, graph.inputs, nothing, (), name).outcome == "equal"


@pytest.mark.parametrize("rewrite", [larger, forgets_writes, raises])
def test_a_wrong_rewrite_is_noticed(rewrite: object) -> None:
    graph = captured_case(case("interleaved_biased"))
    assert callable(rewrite)
    verdict = compare(graph.gm, graph.inputs, rewrite, (), "interleaved_biased")
    assert verdict.outcome == "wrong" and verdict.detail


def test_a_write_that_a_rewrite_loses_is_noticed_in_the_inputs() -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("load", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.get_buffer("load").add_(x.sum(0))
            return x * 2

    from fuzz_graphs import captured

    graph = captured(Counts(), (torch.ones(3, 4),))
    assert "input" in compare(graph.gm, graph.inputs, forgets_writes, (), "counts").detail


def test_unwritten_memory_is_not_compared() -> None:
    graph = captured_case(case("sort_histogram"))
    cumsum = next(node for node in graph.gm.graph.nodes if node.target is torch.cumsum)
    with graph.gm.graph.inserting_after(cumsum):
        fewer = graph.gm.graph.call_function(operator.floordiv, (cumsum, 2))
    cumsum.replace_all_uses_with(fewer, delete_user_cb=lambda user: user is not fewer)
    assert compare(graph.gm, graph.inputs, nothing, (), "half the rows").outcome == "undefined"


def test_edits_repeat_with_the_seed_and_keep_example_values() -> None:
    def edited(seed: int) -> tuple[list[str | None], Captured]:
        graph, rng = captured_case(case("batched_control")), random.Random(seed)
        return [edit(graph.gm, rng) for _ in range(12)], graph

    first, graph = edited(3)
    second, _ = edited(3)
    assert first == second and any(first)
    for node in graph.gm.graph.nodes:
        assert node.op == "output" or "example_value" in node.meta, f"{node} has no example value"


def test_an_edit_that_does_not_run_leaves_the_graph_alone() -> None:
    graph, rng = captured_case(case("scattered_infinity")), random.Random(0)
    for _ in range(60):
        before = str(graph.gm.graph)
        if edit(graph.gm, rng) is None:
            assert str(graph.gm.graph) == before
        graph = Captured(copied(graph.gm), graph.inputs, graph.outputs)


def fused(gm: fx.GraphModule) -> int:
    """The rewrite that the backend makes of one graph."""
    from moecompile.passes.detect import detect
    from moecompile.passes.fuse import fuse

    return fuse(gm.graph, detect(gm.graph).sites)


def fuzz(count: int, seed: int, dynamic: bool = False, tokens: int = TOKENS) -> None:
    """With 2 tokens nearly all dimensions agree: as many tokens as choices, as many assignments as experts."""
    result = campaign({item.name: captured_case(item, dynamic, tokens) for item in CASES}, fused, count, seed)
    assert not result.wrong, str(result)
    assert result.rewritten * 5 > count, f"too few rewrites to prove anything: {result}"


def test_fuzzed_graphs() -> None:
    fuzz(200, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_fuzzed_graphs(seed: int) -> None:
    fuzz(1000, seed=100 + seed, dynamic=seed % 4 == 3, tokens=2 if seed % 4 == 1 else TOKENS)


def test_a_verdict_names_its_edits() -> None:
    verdict = check(captured_case(case("dense_control")), nothing, random.Random(5), 2, "dense_control")
    assert verdict.outcome in ("equal", "undefined", "broken") and verdict.edits
