"""Dispatch tokens in the backward once more, so that the rows that came from all ranks are not held until then.

Contract
- On entry the graph is AOTAutograd's of forward and backward together, not divided yet. A graph without a backward
  stays as it is.
- A backward of experts that reads rows which a dispatch brought reads the same rows of a dispatch of its own: of rows
  alone, for what else came is small, and kept. In FP8 they are quantised again, with the same outcome.
- Where a block and its exchange are one operator (passes/hide.py), its forward and its backward are told to do so.
- That dispatch waits for the gradient (`moecompile::after`), so that it is part of the backward. Exchanges keep the
  graph's order (moecompile/exchange_order.py): where one is under way in its slot, the block stays as it is.
- All ranks rewrite the same blocks, since they have agreed on what is exchanged and on the option.
- Where a region is checkpointed, nothing of it is held, and it stays.

    rows, ids, row_weights, came = dispatch_wait(*dispatch_start(x, expert_ids, weights, sent, home), ...)
    ... = experts_backward(grad, hidden, rows, ...)
        becomes
    sent_again = after(sent, grad)
    again, _, _, _ = dispatch_wait(*dispatch_start(x, None, None, sent_again, home), x, None, None, sent_again, home)
    ... = experts_backward(grad, hidden, again, ...)

What is held of a block is then x, (T, H), which its router has mostly kept anyway, in place of (R * capacity, H).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moecompile.passes.aliases import fake_of
from moecompile.passes.casts import Casting, called, parts_of
from moecompile.passes.joint_graph import (
    BACKWARDS,
    BACKWARDS_FP8,
    EXCHANGED_BACKWARDS,
    argument,
    calls_of,
    forget_how_it_was_traced,
    give,
    operator_of,
)

ops, aten = torch.ops.moecompile, torch.ops.aten
STARTS = (ops.dispatch_start.default, ops.combine_start.default)
WAITS = (ops.dispatch_wait.default, ops.combine_wait.default)
QUANTIZED = 2
"""Of what BACKWARDS_FP8 are given as saved, how many, the first ones, are the rows, quantised."""
SAME = (aten.detach.default, aten.alias.default)


def dispatch_again(graph: fx.Graph) -> int:
    """Rewrite the graph in place; returns of how many blocks tokens are dispatched again. The caller recompiles."""
    done = 0
    for target in (*BACKWARDS, *BACKWARDS_FP8):
        for node in calls_of(graph, target):
            rows = _rows_of(node)
            wait = _wait_of(rows)
            if wait is None or "recompute" in wait.meta or wait.kwargs["slot"] in _under_way(graph, node):
                continue
            with graph.inserting_before(node):
                again = _dispatched(node, wait)
                if target in BACKWARDS:
                    give(node, "x", again)
                else:
                    _quantized_again(node, again)
            done += 1
    return done + sum(_exchanged_again(node) for target in EXCHANGED_BACKWARDS for node in calls_of(graph, target))


def _exchanged_again(backward: fx.Node) -> bool:
    """Has a block that is one operator save no rows, and its backward dispatch what was dispatched."""
    forward = _forward_of(backward)
    if not _calls(forward, ops.exchanged_experts_forward.default) or "recompute" in forward.meta:
        return False
    if argument(forward, "again"):
        return False
    give(forward, "again", True)
    forget_how_it_was_traced(forward)
    give(backward, "x", forward.args[0])
    give(backward, "again", True)
    return True


def _under_way(graph: fx.Graph, before: fx.Node) -> set[Any]:
    """Slots of exchanges that have begun before that node, and not ended."""
    found = set[Any]()
    for node in graph.nodes:
        if node is before:
            return found
        if node.target in STARTS:
            found.add(node.kwargs["slot"])
        elif node.target in WAITS:
            found.discard(node.kwargs["slot"])
    return found


def _rows_of(backward: fx.Node) -> Any:
    """The rows that a backward of experts reads, quantised or not."""
    if operator_of(backward) in BACKWARDS:
        return argument(backward, "x")
    forward = _forward_of(backward)
    return forward.args[0] if _calls(forward, ops.experts_fp8_forward.default) else None


def _forward_of(backward: fx.Node) -> Any:
    """What has saved what a backward is given."""
    return _taken_from(_taken_from(_seen(argument(backward, "saved")[0]), 0), 1)


def _wait_of(rows: Any) -> fx.Node | None:
    """The dispatch that brought them, if one did."""
    found = _taken_from(_seen(rows), 0)
    return found if _calls(found, ops.dispatch_wait.default) else None


def _taken_from(node: Any, number: int) -> Any:
    """What the node is the result of that number of."""
    taken = isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == number
    return _seen(node.args[0]) if taken else None


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _seen(node: Any) -> Any:
    """What it is another name of."""
    while isinstance(node, fx.Node) and node.target in SAME:
        node = node.args[0]
    return node


def _dispatched(backward: fx.Node, wait: fx.Node) -> fx.Node:
    """The rows once more, when the gradient is there."""
    args: Any = wait.args
    x, sent, home, grad = args[4], args[7], args[8], argument(backward, "grad")
    travel = {name: value for name, value in wait.kwargs.items() if name != "num_experts"}
    later = called(backward, ops.after.default, (sent, grad), {})
    tokens = (x, None, None, later, home)
    begun = parts_of(called(backward, ops.dispatch_start.default, tokens, travel))
    return parts_of(called(backward, ops.dispatch_wait.default, (*begun, *tokens), dict(wait.kwargs)))[0]


def _quantized_again(backward: fx.Node, rows: fx.Node) -> None:
    """Gives the backward what its forward saved of the rows, which may have travelled in FP8."""
    saved, scales = argument(backward, "saved"), argument(backward, "scale_format")
    if argument(_forward_of(backward), "lines"):
        made = called(backward, ops.from_lines.default, (rows,), {"features": fake_of(saved[0]).shape[1]})
    else:
        made = called(backward, ops.quantize.default, (rows,), Casting(scale_format=scales).of_rows)
    give(backward, "saved", [*parts_of(made), *saved[QUANTIZED:]])
