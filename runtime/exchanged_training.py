"""Experts that are spread over ranks as one operator, where something is differentiated: there, and back.

    result, saved = exchanged_experts_forward(x, expert_ids, weights, sent, home, w_in, w_out, ...)
    gradients = exchanged_experts_backward(grad, saved, x, sent, home, w_in, w_out, ..., needs=...)

compute what these do, one after the other, to the bit:

    rows, ids, row_weights, came = dispatch(x, expert_ids, weights)
    y, kept = experts_forward(rows, row_weights, plan(ids), ...)
    result = combine(y, came)

    of_y = dispatch(grad)
    of_rows, of_row_weights, ... = experts_backward(of_y, kept, rows, ...)
    of_x, of_weights = combine(of_rows, of_row_weights, came)

In FP8 rows and gradients that the experts quantise travel quantised (`moecompile.runtime.lines`). With `again` the
backward dispatches x once more, and no rows are saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime import exchange, fp8_contract, fp8_experts, kernels, lines, main_gradients
from moecompile.runtime.autocast import exact
from moecompile.runtime.contract import Arguments, expect_shape
from moecompile.runtime.exchanged import in_turn
from moecompile.runtime.exchanged_contract import (
    Experts,
    Plan,
    Returning,
    Saved,
    Tokens,
    Wanted,
    gradient_travels_in_lines,
    travels_in_lines,
)
from moecompile.runtime.fp8_contract import check_fp8
from moecompile.runtime.linear_fp8 import quantize
from moecompile.runtime.peer_memory import PeerMemory
from moecompile.runtime.remembered import CALLS

Parts = list[Tensor]
FORWARD, BACKWARD = "exchanged_experts_forward", "exchanged_experts_backward"
ADDING = f"{BACKWARD}_adding"


def exchanged_experts_forward(
    x: Tensor, expert_ids: Tensor, weights: Tensor | None, sent: Tensor, home: Tensor, *matrices: Tensor | None,
    again: bool = False, **attributes: Any,
) -> tuple[Tensor, Parts]:  # fmt: skip
    """The result (T, H2), and what the backward reads: all that `Saved` has.

    Args:
        x: as of `exchanged_experts`, and so are the next.
        expert_ids: likewise.
        weights: likewise.
        sent: likewise.
        home: likewise.
        matrices: likewise.
        again: whether the backward dispatches x once more.
        attributes: as of `exchanged_experts`, and of `experts_forward`.
    """
    experts, tokens = Experts.of(matrices, **attributes), (x, expert_ids, weights, sent, home)
    memory = experts.memory(x, expert_ids, weights, sent)
    made = None if memory is None else _forward_by_kernels(memory, tokens, experts, again)
    if made is None:
        result, saved = _forward_in_turn(tokens, experts)
        made = [result, *(saved.without_rows() if again else saved).every]
    return made[0], made[1:]


def _forward_by_kernels(memory: PeerMemory, tokens: Tokens, experts: Experts, again: bool) -> Parts | None:
    """The result and what is saved, if all of it is by kernels."""
    from moecompile.runtime import hopper_exchanged, hopper_in_turn

    given = (*tokens, *experts.given, memory.own, memory.bases, memory.told)
    decides = experts.decides | {"again": again}
    known = CALLS.again(FORWARD, given, decides)
    if known is not None:
        return known
    there, back = experts.exchanges(memory)
    brought = hopper_exchanged.Brought(*tokens, experts.num_experts, experts.room)
    if not hopper_in_turn.takes(brought, there, experts.matrices, experts.quantized, experts.attributes):
        return None

    def run() -> Parts:
        result, saved = hopper_in_turn.forward_saving(brought, there, back, experts)
        return [result, *(saved.without_rows() if again else saved).every]

    with exact(tokens[0]):
        return CALLS.first(FORWARD, given, decides, run)


def _forward_in_turn(tokens: Tokens, experts: Experts) -> tuple[Tensor, Saved]:
    x, *others = tokens
    in_lines, kept = travels_in_lines(x, experts), list[Saved]()

    def compute(rows: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
        given = (rows, weights, *plan, *experts.matrices)
        if experts.quantized:
            how: dict[str, Any] = {"quantized": experts.quantized, "lines": in_lines}
            y, of_experts = fp8_experts.experts_fp8_forward(*given, **experts.of_rows, **how)
            if in_lines:
                data = rows.view(torch.uint8)
                of_experts[:2] = data, data.new_empty(0)
        else:
            y, hidden = kernels.experts_forward(*given, **experts.of_rows)
            of_experts = [rows, hidden]
        along = x.new_empty(0) if weights is None else weights
        kept.append(Saved(along, plan[0], plan, tuple(of_experts)))
        return y

    sends = lines.to_lines(x, **experts.scale_format) if in_lines else x
    result, came = in_turn((sends, *others), experts, compute)  # type: ignore[arg-type]
    (saved,) = kept
    return result, replace(saved, came=came)


def fake_exchanged_experts_forward(
    x: Tensor, expert_ids: Tensor, weights: Tensor | None, sent: Tensor, home: Tensor, *matrices: Tensor | None,
    again: bool = False, **attributes: Any,
) -> tuple[Tensor, Parts]:  # fmt: skip
    """Shapes and dtypes of these."""
    experts, (top_k,) = Experts.of(matrices, **attributes), expert_ids.shape[1:]
    rows = x.new_empty((sent.shape[0], x.shape[1]))
    _, *plan = kernels.fake_plan(expert_ids.new_empty((sent.shape[0], top_k)), experts.here, room=experts.room)
    along = None if weights is None else weights.new_empty((sent.shape[0], top_k))
    args = experts.arguments(rows, along, tuple(plan))  # type: ignore[arg-type]
    if experts.quantized:
        check_fp8(args, experts.quantized)
        of_experts = [x.new_empty(shape, dtype=dtype) for shape, dtype in fp8_contract.saved_specs(args)]
        if travels_in_lines(x, experts):
            size = rows.shape[0], 2 * lines.width(rows.shape[1])
            of_experts[:2] = (x.new_empty(each, dtype=torch.uint8) for each in (size, 0))
    else:
        args.check()
        of_experts = [rows, x.new_empty((args.saved_rows, args.width), dtype=args.dtypes.hidden)]
    among = {name: experts.travel[name] for name in ("ranks", "group", "capacity")}
    came, nothing = exchange.came_like(x, expert_ids, weights, sent, **among), x.new_empty(0)
    saved = Saved(nothing if along is None else along, came, tuple(plan), tuple(of_experts))  # type: ignore[arg-type]
    result = x.new_empty((x.shape[0], args.out_features), dtype=args.dtypes.result)
    return result, (saved.without_rows() if again else saved).every


def exchanged_experts_backward(*args: Any, **attributes: Any) -> Parts:
    """The needed gradients, in the order of DIFFERENTIABLE.

    Args:
        args: grad (T, H2), what the forward saved, x (T, H) if that is dispatched `again`, else None, then as of the
            forward from `sent` on.
        attributes: as of the forward, `needs`, as of `experts_backward`, and `quantized`, as of `experts_fp8_backward`.
    """
    return _backward(BACKWARD, *args, **attributes)


def exchanged_experts_backward_adding(
    grad: Tensor, *args: Any, needs: Sequence[bool], **attributes: Any
) -> tuple[Tensor, ...]:
    """The same; what there are main gradients for is added to these, and not needed."""
    found = _backward(ADDING, grad, *args, needs=needs, **attributes)
    return main_gradients.all_of(needs, found, grad)


def _asked(
    operator: str, grad: Tensor, saved: Sequence[Tensor], x: Tensor | None, sent: Tensor, home: Tensor,
    *matrices: Tensor | None, needs: Sequence[bool], again: bool = False, **attributes: Any,
) -> tuple[Returning, Experts, Wanted]:  # fmt: skip
    """A backward's arguments as records."""
    main = main_gradients.split(attributes)
    experts = Experts.of(matrices, **attributes)
    of = Returning.of(operator, (grad, saved, x, sent, home), experts, again)
    return of, experts, Wanted(tuple(needs), main, of.saved.row_weights is not None)


def _backward(operator: str, *args: Any, **attributes: Any) -> Parts:
    of, experts, wanted = _asked(operator, *args, **attributes)
    memory = experts.memory(of.saved.like_rows(experts), None, of.saved.row_weights, of.sent)
    made = None if memory is None else _backward_by_kernels(operator, memory, of, experts, wanted)
    if made is None:
        _checked(operator, of, experts, wanted)
        found = _backward_in_turn(of, experts, wanted)
        made = [found[name] for name in wanted.names]
    return made


def _backward_by_kernels(
    operator: str, memory: PeerMemory, of: Returning, experts: Experts, wanted: Wanted
) -> Parts | None:
    """The needed gradients, if all of it is by kernels."""
    from moecompile.runtime import hopper_exchanged, hopper_in_turn

    main = map(wanted.main.get, main_gradients.MATRICES)
    given = (of.grad, *of.saved.every, of.x, of.sent, of.home, *experts.given, *main)
    given, decides = (*given, memory.own, memory.bases, memory.told), experts.decides | {"needs": wanted.needs}
    known = CALLS.again(operator, given, decides)  # what is remembered has been checked
    if known is not None:
        return known
    args = _checked(operator, of, experts, wanted)
    if not hopper_exchanged.are_taken(args, experts.quantized, memory.ranks):
        return None

    def run() -> Parts:
        found = hopper_in_turn.backward(of, *experts.exchanges(memory), experts, args, wanted)
        return [found[name] for name in wanted.names]

    with exact(of.grad):
        return CALLS.first(operator, given, decides, run)


def _backward_in_turn(of: Returning, experts: Experts, wanted: Wanted) -> dict[str, Tensor]:
    """By the operators that the pass `exchange` writes."""
    saved, grad, in_lines = of.saved, of.grad, gradient_travels_in_lines(of.grad, experts)
    if of.x is not None:
        saved = saved.with_rows(_rows_again(of, of.x, experts))
    sends = lines.to_lines(grad, **experts.scale_format) if in_lines else grad
    of_y = _dispatched(sends, of, experts.back)
    weights = saved.row_weights
    args = (weights, *saved.plan, *experts.matrices)
    how = {**experts.of_rows, "needs": wanted.of_rows, **main_gradients.keywords(wanted.main)}
    if experts.quantized:
        back = fp8_experts.experts_fp8_backward_adding if wanted.main else fp8_experts.experts_fp8_backward
        rows = [each.contiguous() for each in saved.quantized_rows(saved.like_rows(experts).shape[1])]
        found = back(of_y, [*rows, *saved.hidden], *args, **how, quantized=experts.quantized, lines=in_lines)
    else:
        back = kernels.experts_backward_adding if wanted.main else kernels.experts_backward
        found = back(of_y, *saved.hidden, *saved.of_rows, *args, **how)
    if wanted.main:
        found = [each for each, needed in zip(found, wanted.of_rows, strict=True) if needed]
    grads = dict(zip(wanted.names_of_rows, found, strict=True))
    return grads | _combined(of, experts, grads) if wanted.goes_back else grads


def _rows_again(of: Returning, x: Tensor, experts: Experts) -> Sequence[Tensor]:
    """The rows that came, once more, as the forward saves them."""
    if not experts.quantized:
        return [_dispatched(x, of, experts.travel)]
    if not travels_in_lines(x, experts):
        return quantize(_dispatched(x, of, experts.travel), **experts.scale_format)
    came = _dispatched(lines.to_lines(x, **experts.scale_format), of, experts.travel).view(torch.uint8)
    return came, came.new_empty(0)


def _dispatched(rows: Tensor, of: Returning, travel: dict[str, Any]) -> Tensor:
    """What comes of such rows, of all ranks."""
    given = rows, None, None, of.sent, of.home
    begun = exchange.dispatch_start(*given, **travel)
    came, *_ = exchange.dispatch_wait(*begun, *given, num_experts=travel["ranks"], **travel)  # type: ignore[arg-type]
    return came


def _combined(of: Returning, experts: Experts, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of x and of the weights, of those of the rows that came."""
    rows, weights, travel = grads["x"], grads.get("weights"), experts.travel
    begun = exchange.combine_start(rows, weights, of.saved.came, of.sent, of.home, **travel)
    of_x, of_weights = exchange.combine_wait(*begun, rows, weights, of.sent, of.home, **travel)
    return {"x": of_x} if weights is None else {"x": of_x, "weights": of_weights}


def fake_exchanged_experts_backward(*args: Any, **attributes: Any) -> Parts:
    """Shapes, dtypes and strides of the needed gradients."""
    return _fake_backward(BACKWARD, *args, **attributes)


def fake_exchanged_experts_backward_adding(
    grad: Tensor, *args: Any, needs: Sequence[bool], **attributes: Any
) -> tuple[Tensor, ...]:
    """The same."""
    found = _fake_backward(ADDING, grad, *args, needs=needs, **attributes)
    return main_gradients.all_of(needs, found, grad)


def _fake_backward(operator: str, *args: Any, **attributes: Any) -> Parts:
    of, experts, wanted = _asked(operator, *args, **attributes)
    record = _checked(operator, of, experts, wanted)
    tokens = {"x": record.features, "weights": record.slots.shape[1]}
    like = {name: getattr(record, name) for name in wanted.names}
    return [
        of.grad.new_empty((of.home.shape[0], tokens[name]), dtype=each.dtype)
        if name in tokens
        else torch.empty_like(each)
        for name, each in like.items()
    ]


def _checked(operator: str, of: Returning, experts: Experts, wanted: Wanted) -> Arguments:
    """The record of the experts on the rows that came; raises ValueError or TypeError for what does not fit it."""
    args, saved = of.saved.arguments(experts), of.saved
    of_y = of.grad.new_empty((1, 1)).expand(args.x.shape[0], args.out_features)
    if experts.quantized:
        check_fp8(args, experts.quantized, backward=True, kept=True)
        rows = [of.grad.new_empty(shape, dtype=dtype) for shape, dtype in fp8_contract.saved_specs(args)[:2]]
        if of.x is None:
            rows = [*saved.quantized_rows(args.features)]
        fp8_contract.check_fp8_backward(args, of_y, [*rows, *saved.hidden])
    else:
        args.check().check_backward(of_y, *saved.hidden)
    expect_shape(operator, of.grad, "grad", (of.home.shape[0], args.out_features), "(tokens, features)")
    kernels.needed(args, wanted.needs, operator, wanted.main)
    main_gradients.check(args, wanted.main, operator)
    return args
