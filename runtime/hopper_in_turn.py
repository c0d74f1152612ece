"""Experts between ranks on Hopper GPUs, one step after the other, for tokens that are too few to hide their exchange.

    send tokens; take them, ids and weights; plan; GEMM1, GEMM2, sum; send the sums back; sum these at home

Launches alone, of one stream: the program of a call like one before (`moecompile.runtime.remembered`) takes the host a
fifth of the time of the operators (docs/perf.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moecompile.runtime import exchange, hopper_exchange, hopper_experts, hopper_fp8, hopper_routing
from moecompile.runtime.contract import Arguments
from moecompile.runtime.hopper_exchange import Exchange, Rows
from moecompile.runtime.hopper_exchanged import Brought, are_taken, arguments_for


def takes(
    tokens: Brought, there: Exchange, matrices: Sequence[Tensor | None], quantized: Sequence[Tensor],
    attributes: dict[str, Any],
) -> bool:  # fmt: skip
    """Whether the kernels compute these: on all ranks of one model the same, however many tokens each has."""
    ranks = there.memory.ranks
    args = arguments_for(tokens, matrices, attributes, tokens.num_experts // ranks, ranks * there.capacity)
    return are_taken(args, quantized, ranks)


def forward(
    tokens: Brought, there: Exchange, back: Exchange, matrices: Sequence[Tensor | None], quantized: Sequence[Tensor],
    attributes: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The result (T, H2)."""
    here = tokens.num_experts // there.memory.ranks
    given = Rows.of(tokens.x, tokens.ids, tokens.weights)
    into, came = given.room(tokens.sent.shape[0]), tokens.sent.new_empty(there.memory.ranks)
    hopper_exchange.send(there, given, tokens.sent, None)
    hopper_exchange.receive(there, given, tokens.sent, into, came, here)
    assert into.ids is not None
    counts, *plan = hopper_routing.plan(into.ids, here, tokens.room)
    args = Arguments(into.values, into.weights, *plan, *matrices, **attributes, room=tokens.room)
    y, _ = hopper_fp8.forward(args, quantized, save=False) if quantized else hopper_experts.forward(args, save=False)
    if tokens.room is not None:
        came = exchange.within(came, counts, tokens.room)
    sums = Rows(y).room(tokens.home.shape[0])
    hopper_exchange.send(back, Rows(y), None, came)
    hopper_exchange.home(back, tokens.home, Rows(y), sums)
    return sums.values
