"""Experts between ranks on Hopper GPUs, one step after the other: in training, and of few tokens, in inference too.

    send tokens; take them, ids and weights; plan; GEMM1, GEMM2, sum; send the sums back; sum these at home

    send gradients; take them; back through GEMM2 and the activation; gradient of w_out; of rows, sum
        send the sums back, on another stream           gradient of w_in
    sum these at home

Nobody waits for the gradient of w_in, which takes longer than what is sent is on its way. In 16 bits its blocks take
tiles as multiprocessors become free (codegen/kernels/tickets.cuh); in FP8 what is turned before it takes so long.

Launches alone: the program of a call like one before (`moecompile.runtime.remembered`) takes the host a fifth of the
time of the operators (docs/perf.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime import (
    exchange,
    hopper_exchange,
    hopper_experts,
    hopper_fp8,
    hopper_quantize,
    hopper_routing,
    lines,
    main_gradients,
)
from moecompile.runtime.contract import Arguments
from moecompile.runtime.exchanged_contract import Experts, Returning, Saved, Wanted, gradient_travels_in_lines
from moecompile.runtime.hopper_exchange import Exchange, Rows
from moecompile.runtime.hopper_exchanged import Brought, are_taken, arguments_for
from moecompile.runtime.hopper_experts import Ready
from moecompile.runtime.launch import wait_for


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
    return _returned(Rows(y), back, came, tokens.home).values


def forward_saving(tokens: Brought, there: Exchange, back: Exchange, experts: Experts) -> tuple[Tensor, Saved]:
    """The result (T, H2), and what `backward` reads."""
    x = _in_lines(tokens.x, experts) if experts.quantized else tokens.x
    given = Rows.of(x, tokens.ids, tokens.weights)
    into, came = given.room(tokens.sent.shape[0]), tokens.sent.new_empty(there.memory.ranks)
    hopper_exchange.send(there, given, tokens.sent, None)
    hopper_exchange.receive(there, given, tokens.sent, into, came, experts.here)
    assert into.ids is not None
    counts, *plan = hopper_routing.plan(into.ids, experts.here, tokens.room)
    weights = tokens.x.new_empty(0) if into.weights is None else into.weights
    saved = Saved(weights, came, tuple(plan), ())  # type: ignore[arg-type]
    if tokens.room is not None:
        saved = replace(saved, came=exchange.within(came, counts, tokens.room))
    y, of_experts = _forward_of_rows(into.values, saved, tokens.x, experts)
    return _returned(Rows(y), back, saved.came, tokens.home).values, replace(saved, of_experts=of_experts)


def _in_lines(rows: Tensor, experts: Experts) -> Tensor:
    """Quantised, each with its scales behind it, bytes."""
    return hopper_quantize.quantize_lines(hopper_experts._lines(rows), **experts.scale_format)


def _forward_of_rows(
    rows: Tensor, saved: Saved, like: Tensor, experts: Experts
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """What goes back of the rows that came, and what the experts save."""
    weights = saved.row_weights
    if experts.quantized:
        args = experts.arguments(like.new_empty((rows.shape[0], like.shape[1]), device="meta"), weights, saved.plan)
        y, kept = hopper_fp8.forward(args, experts.quantized, save=True, tokens=lines.parts(rows, like.shape[1]))
        assert kept is not None
        return y, (rows, rows.new_empty(0), *kept[2:])
    args = experts.arguments(rows, weights, saved.plan)
    y, hidden = hopper_experts.forward(args, save=True)
    return y, (rows, rows.new_empty((0, args.width)) if hidden is None else hidden)


def backward(
    of: Returning, there: Exchange, back: Exchange, experts: Experts, args: Arguments, wanted: Wanted
) -> dict[str, Tensor]:
    """The wanted gradients, by name.

    Args:
        of: what the backward is given.
        there: the exchange that brought the tokens: their gradients go back by it, and so do tokens that come again.
        back: the exchange that took results back: it brings their gradients.
        experts: this rank's.
        args: their record, without rows.
        wanted: which gradients.
    """
    saved = of.saved
    if of.x is not None:
        x = _in_lines(of.x, experts) if experts.quantized else of.x
        came = _dispatched(x, there, of.sent)
        saved = saved.with_rows([came, came.new_empty(0)] if experts.quantized else [came])
    going = _GoingBack(there, saved.came, of.home) if wanted.goes_back and wanted.of_gemm1 else None
    try:
        grads = _backward_of_rows(of, saved, back, experts, args, wanted, going)
    except BaseException:  # no memory, say: what other ranks have sent is not to be taken for the slot's next exchange
        if going is not None and going.is_on_its_way:
            going.home()
        raise
    if going is not None:
        return grads | going.home()
    if wanted.goes_back:
        return grads | _by_name(_returned(_going(grads), there, saved.came, of.home))
    return grads


def _going(grads: Mapping[str, Tensor]) -> Rows:
    """What goes home: the gradients of x, and of the weights that belong to it."""
    return Rows(grads["x"], None, grads.get("weights"))


def _by_name(rows: Rows) -> dict[str, Tensor]:
    return {"x": rows.values} | ({} if rows.weights is None else {"weights": rows.weights})


class _GoingBack:
    """Gradients of rows, summed by token, on their way home while others are computed."""

    def __init__(self, exchange: Exchange, came: Tensor, home: Tensor) -> None:
        self.exchange, self.came, self.places, self.is_on_its_way = exchange, came, home, False

    def __call__(self, grads: Mapping[str, Tensor]) -> None:
        """Sends them."""
        self.rows = rows = _going(grads)
        self.into, self.started = rows.room(self.places.shape[0]), self.came.new_zeros(1)
        side = self.exchange.memory.side
        wait_for(side, torch.cuda.current_stream(self.came.device))
        with torch.cuda.stream(side):
            hopper_exchange.send(self.exchange, rows, None, self.came, started=self.started)
        self.is_on_its_way = True
        hopper_exchange.await_start(self.exchange, self.started)

    def home(self) -> dict[str, Tensor]:
        """What has come of this rank's tokens."""
        wait_for(torch.cuda.current_stream(self.came.device), self.exchange.memory.side)
        hopper_exchange.home(self.exchange, self.places, self.rows, self.into, anyway=True)
        return _by_name(self.into)


def _dispatched(values: Tensor, exchange: Exchange, sent: Tensor, of_experts: Arguments | None = None) -> Tensor:
    """What comes of such rows, of all ranks, or the rows of experts that these become."""
    rows, slots = Rows.of(values, None, None), None if of_experts is None else of_experts.slots.contiguous()
    into = rows.room(sent.shape[0] if of_experts is None else of_experts.rows)
    came = sent.new_empty(exchange.memory.ranks)
    hopper_exchange.send(exchange, rows, sent, None)
    hopper_exchange.receive(exchange, rows, sent, into, came, 1, slots)
    return into.values


def _returned(rows: Rows, exchange: Exchange, came: Tensor, home: Tensor) -> Rows:
    """What comes back of this rank's tokens, where all ranks send such rows back, summed."""
    into = rows.room(home.shape[0])
    hopper_exchange.send(exchange, rows, None, came)
    hopper_exchange.home(exchange, home, rows, into)
    return into


def _backward_of_rows(
    of: Returning, saved: Saved, back: Exchange, experts: Experts, args: Arguments, wanted: Wanted, ready: Ready | None
) -> dict[str, Tensor]:
    """The gradients of the rows that came, of their weights and of what the experts have; adds to main gradients."""
    added, others = main_gradients.divided(wanted.main)
    needs = frozenset((*wanted.names_of_rows, *others))
    if experts.quantized:
        in_lines = gradient_travels_in_lines(of.grad, experts)
        of_y = _dispatched(_in_lines(of.grad, experts) if in_lines else of.grad, back, of.sent)
        tokens = lines.parts(of_y, args.out_features) if in_lines else None
        kept = *saved.quantized_rows(args.features), *saved.hidden
        grads = hopper_fp8.backward(args, experts.quantized, of_y, kept, needs, added, of_tokens=tokens, ready=ready)
    else:
        (rows,), (hidden,) = saved.of_rows, saved.hidden
        args = replace(args, x=rows)
        hidden = hopper_experts.hidden_rows(args) if args.recompute else hidden
        received = partial(_dispatched, of.grad.to(args.dtypes.activation), back, of.sent, args)
        grads = hopper_experts.backward(args, received, hidden, needs, added, ready)
    main_gradients.add(others, grads)
    return grads
