"""Let rows that are multiplied in FP8 travel between ranks in FP8, at half the bytes.

Contract
- On entry the graph is AOTAutograd's of forward and backward together, not divided yet. A graph without experts in FP8,
  or without an exchange, stays as it is.
- Rows that a dispatch brings to `experts_fp8_forward`, which quantises them, and gradients that one brings to
  `experts_fp8_backward`, which does so too, are quantised before they are sent. Each row is quantised by itself, so the
  results are the same, to the bit.
- Who else reads what came reads numbers: then it stays. So does what activation checkpointing lays down where it runs,
  and a gradient that biases of the second products are summed of.
- All ranks rewrite the same blocks: they have agreed on what is exchanged, and on the options that decide what is cast.

    rows, ids, weights, came = dispatch_wait(*dispatch_start(x, expert_ids, w, sent, home), x, ...)
    out, saved = experts_fp8_forward(rows, ...)
        becomes
    lines = to_lines(x)
    rows, ids, weights, came = dispatch_wait(*dispatch_start(lines, expert_ids, w, sent, home), lines, ...)
    out, saved = experts_fp8_forward(rows, ..., lines=True)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from moecompile.passes.aliases import fake_of
from moecompile.passes.casts import Casting, called
from moecompile.passes.joint_graph import (
    BACKWARDS_FP8,
    argument,
    calls_of,
    forget_how_it_was_traced,
    give,
    operator_of,
)
from moecompile.runtime import lines

ops = torch.ops.moecompile
FORWARD = ops.experts_fp8_forward.default
TOKEN_OF_WAIT, X_OF_WAIT = 3, 4
"""Where `dispatch_wait` is given the token of its start, and again what is sent; in a backward with collectives that is
what is in flight, and with kernels what is in flight is what is sent."""


def let_rows_travel_quantized(graph: fx.Graph) -> int:
    """Rewrite the graph in place; returns how many dispatches there are in FP8. The caller recompiles."""
    done = 0
    for target in (FORWARD, *BACKWARDS_FP8):
        for reader in calls_of(graph, target):
            dispatch = _dispatch_of(reader)
            if dispatch is not None:
                _quantize(*dispatch, reader)
                done += 1
    return done


def _dispatch_of(reader: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Start and wait of the dispatch that brings what the experts quantise, if nobody else reads that."""
    rows = argument(reader, _travelling(reader))
    if rows.target is not operator.getitem or rows.args[1] != 0 or set(rows.users) != {reader}:
        return None
    wait: Any = rows.args[0]
    if wait.target is not ops.dispatch_wait.default or "recompute" in wait.meta or "recompute" in reader.meta:
        return None
    if argument(reader, "lines"):
        return None
    start = _start_of(wait)
    if start is None or wait.args[X_OF_WAIT] not in (start.args[0], wait.args[0]):
        return None
    x = fake_of(start.args[0])  # type: ignore[arg-type]
    biased = operator_of(reader) in BACKWARDS_FP8 and argument(reader, "b_out") is not None
    alike = x.dtype == fake_of(argument(reader, "w_in")).dtype and x.dtype in lines.DTYPES and lines.takes(x.shape[1])
    return (start, wait) if alike and not biased else None


def _start_of(wait: fx.Node) -> fx.Node | None:
    """What has begun the exchange, as its token says; what else the wait is given of it may be what was sent."""
    token: Any = wait.args[TOKEN_OF_WAIT]
    start: Any = token.args[0] if token.target is operator.getitem else None
    return start if start is not None and start.target is ops.dispatch_start.default else None


def _travelling(reader: fx.Node) -> str:
    """Which of its arguments it quantises."""
    return "x" if operator_of(reader) is FORWARD else "grad"


def _quantize(start: fx.Node, wait: fx.Node, reader: fx.Node) -> None:
    """Has them sent as lines, and read so."""
    x: Any = start.args[0]
    how = Casting(scale_format=argument(reader, "scale_format")).of_rows
    with start.graph.inserting_before(start):
        made = called(start, ops.to_lines.default, (x,), how)
    for node in (start, wait):
        node.args = tuple(made if each is x else each for each in node.args)
        forget_how_it_was_traced(node)
    give(reader, "lines", True)
