"""The pass `hide`: on gloo what 2 ranks check together (tests/hidden_exchange_checks.py), and what it leaves alone."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

import hidden_exchange_checks
from moecompile.passes import hide
from moecompile.passes.hide import hide_exchanges
from moecompile.runtime.exchanged import hides
from together import together

ops = torch.ops.moecompile
TRAVEL = {"ranks": 2, "group": "0", "capacity": 1024, "sms": 4, "patience": 1.0}

results, test_together = together(hidden_exchange_checks.__name__)


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens travel as on GPUs."""
    monkeypatch.setattr(hide, "by_kernels", lambda *_: True)


def block(**changed: Any) -> tuple[fx.Graph, dict[str, Any]]:
    """As passes/expert_parallel.py writes one, but for what is changed; and its nodes by name."""
    graph, nodes = fx.Graph(), dict[str, Any]()

    def several(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> list[fx.Node]:
        made = graph.call_function(target, args, kwargs)
        return [graph.call_function(operator.getitem, (made, number)) for number in range(count)]

    x, ids, weights, w_in, w_out = (graph.placeholder(name) for name in ("x", "ids", "weights", "w_in", "w_out"))
    for node, shape in (
        (x, (1024, 64)),
        (ids, (1024, 2)),
        (weights, (1024, 2)),
        (w_in, (4, 64, 64)),
        (w_out, (4, 64, 32)),
    ):
        node.meta["example_value"] = torch.empty(shape, device="meta")
    travel = TRAVEL | {"capacity": changed.get("capacity", 1024)}
    sent, home = several(ops.exchange_plan.default, (ids,), {"num_experts": 8, "ranks": 2, "capacity": 1024}, 2)
    there, back = {**travel, "slot": 2}, {**travel, "slot": changed.get("slot", 3)}
    tokens = (x, ids, weights, sent, home)
    begun = several(ops.dispatch_start.default, tokens, there, 4)
    rows, row_ids, row_weights, came = several(
        ops.dispatch_wait.default, (*begun, *tokens), {"num_experts": 8, **there}, 4
    )
    limit = {"room": 4096} if "within" in changed else {}
    counts, *planned = several(ops.plan.default, (changed.get("planned", lambda *_: row_ids)(ids), 4), limit, 4)
    if "within" in changed:
        came = graph.call_function(ops.came_within.default, (came, counts), {"room": changed["within"]})
    weighted = changed.get("weighted", lambda given: given)(row_weights)
    y = graph.call_function(
        ops.experts.default, (rows, weighted, *planned, w_in, w_out),
        {"activation": "mul(silu(gate), up)", "gate_up": "halves", "recompute": True, **limit},
    )  # fmt: skip
    given = (changed.get("result", lambda node: node)(y), None, came, sent, home)
    parts = several(ops.combine_start.default, given, back, 3)
    result, _ = several(ops.combine_wait.default, (*parts, y, None, sent, home), back, 2)
    result.meta["example_value"] = torch.empty(1024, 64, device="meta")
    nodes |= {"rows": rows, "came": came, "y": y, "result": result}
    graph.output((result, *(nodes[name] for name in changed.get("read", ()))))
    return graph, nodes


def test_a_block_becomes_one_operator() -> None:
    graph, _ = block()
    assert hide_exchanges(graph) == (1, 1)
    graph.lint()
    (node,) = graph.find_nodes(op="call_function", target=ops.exchanged_experts.default)
    assert [each.name for each in node.all_input_nodes[:3]] == ["x", "ids", "weights"]
    assert node.kwargs["slot"] == 2 and node.kwargs["num_experts"] == 8 and "recompute" not in node.kwargs
    assert node.meta["example_value"].shape == (1024, 64)
    assert not graph.find_nodes(op="call_function", target=ops.dispatch_wait.default)


def test_room_for_few_rows_goes_along() -> None:
    graph, _ = block(within=4096)
    assert hide_exchanges(graph) == (1, 1)
    graph.lint()
    (node,) = graph.find_nodes(op="call_function", target=ops.exchanged_experts.default)
    assert node.kwargs["room"] == 4096


def halved(node: fx.Node) -> fx.Node:
    """Of half the size, on its way."""
    return node.graph.call_function(torch.mul, (node, 0.5))


@pytest.mark.parametrize(
    "changed",
    [
        {"read": ("rows",)},
        {"read": ("came",)},
        {"read": ("y",)},
        {"slot": 5},
        {"planned": lambda ids: ids},
        {"weighted": halved},
        {"weighted": lambda _: None},
        {"result": halved},
        {"within": 4095},
    ],
    ids=[
        "rows read",
        "counts read",
        "sums read",
        "another slot",
        "another plan",
        "weights changed",
        "no weights",
        "sums changed",
        "other rows",
    ],
)
def test_what_is_not_such_a_block_stays(changed: dict[str, Any]) -> None:
    graph, _ = block(**changed)
    before = str(graph)
    assert hide_exchanges(graph) == (0, 0) and str(graph) == before


def test_what_collectives_carry_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hide, "by_kernels", lambda *_: False)
    graph, _ = block()
    assert hide_exchanges(graph) == (0, 0)


def test_few_tokens_hide_nothing() -> None:
    assert hides(2, 4096, 8, 64) and hides(2, 8192, 8, 128) and not hides(2, 128, 8, 64)
    assert hides(2, 1024, 8, 64) and not hides(2, 1023, 8, 64) and not hides(1, 4096, 8, 64)


def test_few_tokens_become_one_operator_all_the_same() -> None:
    graph, _ = block(capacity=128)
    assert hide_exchanges(graph) == (1, 0)
    assert graph.find_nodes(op="call_function", target=ops.exchanged_experts.default)
