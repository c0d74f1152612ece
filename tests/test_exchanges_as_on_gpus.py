"""Passes over AOTAutograd's graphs as they are where kernels exchange tokens: waits are given what was sent.

There is nobody to exchange with: the graphs are traced, and never run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.lowering import eager
from moecompile.passes.dispatch_again import dispatch_again
from moecompile.passes.quantized_travel import let_rows_travel_quantized
from moecompile.runtime import autograd_exchange, exchange

ops = torch.ops.moecompile
TOKENS, CAPACITY, FEATURES, INNER, EXPERTS, TOP_K = 6, 8, 256, 128, 4, 2
TRAVEL: dict[str, Any] = {"ranks": 2, "group": "nobody", "capacity": CAPACITY, "sms": 4, "patience": 1.0}


class TracedError(Exception):
    """The graph is there, and is not to be run."""


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens travel as on GPUs."""
    for module in (exchange, autograd_exchange):
        monkeypatch.setattr(module, "by_kernels", lambda *_: True)


class Block(nn.Module):
    """As the passes write one."""

    def __init__(self, fp8: bool) -> None:
        super().__init__()
        self.fp8 = fp8
        self.w_in = nn.Parameter(torch.randn(EXPERTS // 2, 2 * INNER, FEATURES).bfloat16())
        self.w_out = nn.Parameter(torch.randn(EXPERTS // 2, FEATURES, INNER).bfloat16())

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sent, home = ops.exchange_plan(ids, num_experts=EXPERTS, ranks=2, capacity=CAPACITY)
        there, back = ({**TRAVEL, "slot": slot} for slot in (0, 1))
        tokens = (x, ids, weights, sent, home)
        begun = ops.dispatch_start(*tokens, **there)
        rows, row_ids, row_weights, came = ops.dispatch_wait(*begun, *tokens, num_experts=EXPERTS, **there)
        _, *plan = ops.plan(row_ids, EXPERTS // 2)
        attributes: dict[str, Any] = {"activation": "mul(silu(gate), up)", "gate_up": "halves"}
        attributes |= {"output": "mul(out, cast(weight, bfloat16))"}
        given = (rows, row_weights, *plan, self.w_in, self.w_out)
        if self.fp8:
            copies = [*ops.quantize_weights(self.w_in, gate_up="halves"), *ops.quantize_weights(self.w_out)]
            y = ops.experts_fp8(*given, **attributes, quantized=copies)
        else:
            y = ops.experts(*given, **attributes)
        parts = ops.combine_start(y, None, came, sent, home, **back)
        result, _ = ops.combine_wait(*parts, y, None, sent, home, **back)
        return F.silu(result)


def traced(fp8: bool) -> fx.Graph:
    """Forward and backward together, before anything is done to them."""
    found: list[fx.Graph] = []

    def joint(graph: fx.Graph) -> None:
        found.append(graph)
        raise TracedError

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        return eager(gm, inputs, seen=lambda *_: None, joint=joint)

    torch._dynamo.reset()
    ids = torch.arange(TOKENS * TOP_K).view(TOKENS, TOP_K) % EXPERTS
    x = torch.randn(TOKENS, FEATURES).bfloat16().requires_grad_()
    weights = torch.rand(TOKENS, TOP_K).requires_grad_()
    try:
        torch.compile(Block(fp8), backend=backend, fullgraph=True)(x, ids, weights)
    except Exception as error:
        assert TracedError.__name__ in repr(error) or isinstance(error.__cause__, TracedError), error
    (graph,) = found
    return graph


def calls(graph: fx.Graph, operator: Any) -> list[fx.Node]:
    """Of that operator, in their order."""
    return graph.find_nodes(op="call_function", target=operator)


def is_consistent(graph: fx.Graph) -> bool:
    """Whether example values are those of the operators, and every wait is given what its start was."""
    graph.lint()
    for wait in calls(graph, ops.dispatch_wait.default):
        args: Any = wait.args
        handle, start = args[0], args[3].args[0]
        assert args[4] is start.args[0] and args[7:] == start.args[3:]
        assert wait.meta["val"][0].shape == (2 * CAPACITY, start.args[0].meta["val"].shape[1])
        assert handle is start.args[0] or handle.args[0] is start
    return True


def test_rows_and_gradients_travel_quantized() -> None:
    graph = traced(fp8=True)
    assert is_consistent(graph) and let_rows_travel_quantized(graph) == 2 and is_consistent(graph)
    sent: list[Any] = [node.args[0] for node in calls(graph, ops.dispatch_start.default)]
    assert [each.target for each in sent] == [ops.to_lines.default] * 2
    assert let_rows_travel_quantized(graph) == 0, "they are already"


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_tokens_are_dispatched_again(fp8: bool, lines: bool) -> None:
    graph = traced(fp8)
    assert let_rows_travel_quantized(graph) == (2 if fp8 else 0) if lines else True
    assert dispatch_again(graph) == 1 and is_consistent(graph)
    first, _, again = calls(graph, ops.dispatch_start.default)
    assert again.args[0] is first.args[0] and again.args[1:3] == (None, None) and again.kwargs == first.kwargs
    later: Any = again.args[3]
    assert later.target is ops.after.default and later.args[0] is first.args[3]


def test_a_slot_that_is_taken_is_left_alone() -> None:
    """By an exchange that has begun before the backward of the experts, and ends after it."""
    graph = traced(fp8=False)
    (backward,) = calls(graph, ops.experts_backward.default)
    grad: Any = backward.args[0]
    start = calls(graph, ops.dispatch_start.default)[0]
    with graph.inserting_before(backward):
        graph.call_function(ops.dispatch_start.default, (grad, None, None, *start.args[3:]), dict(start.kwargs))
    assert dispatch_again(graph) == 0


def test_nothing_is_rewritten_where_nothing_is_exchanged() -> None:
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    assert let_rows_travel_quantized(graph) == 0 and dispatch_again(graph) == 0
