"""Experts that are spread over ranks as one operator, from dispatch to combine.

    result = exchanged_experts(x, expert_ids, weights, sent, home, w_in, w_out, ...)

computes what these do, one after the other, to the bit (`moecompile.runtime.exchange` says what each of them does):

    rows, ids, row_weights, came = dispatch(x, expert_ids, weights)
    y = experts(rows, row_weights, plan(ids), w_in, w_out, ...)        or experts_fp8
    result = combine(y, came)

Where moecompile's kernels exchange tokens, all of it is launched from a program of its own: to a host that would call
the operators one by one, few tokens' experts are as long on their way as on the device. Where tokens are many, the
exchange is hidden behind the experts (`moecompile.runtime.hopper_exchanged`), and in FP8 it is quantised tokens that
travel. All ranks have to do so or none: what decides is what they have agreed on.

Where something is differentiated it becomes the operators of `moecompile.runtime.exchanged_training`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moecompile.runtime import exchange, fp8_experts, kernels, main_gradients
from moecompile.runtime.autocast import exact
from moecompile.runtime.exchanged_contract import Experts, Plan, Tokens, without
from moecompile.runtime.fp8_contract import check_fp8
from moecompile.runtime.main_gradients import KEYWORDS
from moecompile.runtime.peer_memory import PeerMemory
from moecompile.runtime.remembered import CALLS

OF_BACKWARD = ("recompute", "mean_over", "held", *KEYWORDS.values())
"""Attributes that say nothing where there is none."""
HIDES_FROM = 128
"""Tokens of a rank for each expert, on average, from which the exchange is hidden: a tile's rows. An expert's matrices
are read twice then, by its own rank's tokens and by the others': with fewer, to read them is what takes the time."""


def hides(ranks: int, capacity: int, top_k: int, num_experts: int) -> bool:
    """Whether an exchange of so many tokens a rank is hidden: the same answer on all ranks."""
    return ranks > 1 and capacity * top_k >= HIDES_FROM * num_experts


def exchanged_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor | None, sent: Tensor, home: Tensor, *matrices: Tensor | None,
    **attributes: Any,
) -> Tensor:  # fmt: skip
    """The result (T, H2).

    Args:
        x: (T, H).
        expert_ids: (T, K) integers, of all ranks' experts; -1 means no expert.
        weights: (T, K) or None.
        sent: of `exchange_plan`.
        home: likewise.
        matrices: w_in, w_out, w_up, b_in, b_up, b_out of this rank's experts, as of `experts`.
        attributes: num_experts, of all ranks; quantized, as of `experts_fp8`; room; those of the exchange, and of the
            experts (`Experts`).
    """
    experts = Experts.of(matrices, **without(attributes, OF_BACKWARD))
    tokens = x, expert_ids, weights, sent, home
    memory = experts.memory(x, expert_ids, weights, sent)
    found = None if memory is None else _by_kernels(memory, tokens, experts)
    if found is not None:
        return found

    def compute(rows: Tensor, row_weights: Tensor | None, plan: Plan) -> Tensor:
        given = (rows, row_weights, *plan, *experts.matrices)
        if experts.quantized:
            return fp8_experts.experts_fp8(*given, quantized=experts.quantized, **experts.of_rows)
        return kernels.experts(*given, **experts.of_rows)

    result, _ = in_turn(tokens, experts, compute)
    return result


def _by_kernels(memory: PeerMemory, tokens: Tokens, experts: Experts) -> Tensor | None:
    """The result, if all of it is by kernels."""
    from moecompile.runtime import hopper_exchanged, hopper_in_turn

    given = (*tokens, *experts.given, memory.own, memory.bases, memory.told)
    known = CALLS.again("exchanged_experts", given, experts.decides)
    if known is not None:
        return known[0]
    x, expert_ids, *_ = tokens
    there, back = experts.exchanges(memory)
    brought = hopper_exchanged.Brought(*tokens, experts.num_experts, experts.room)
    few = not hides(memory.ranks, there.capacity, expert_ids.shape[1], experts.num_experts)
    chosen = hopper_in_turn if few else hopper_exchanged
    how = experts.matrices, experts.quantized, experts.attributes
    if not chosen.takes(brought, there, *how):
        return None

    def run() -> list[Tensor]:
        return [chosen.forward(brought, there, back, *how)]

    with exact(x):
        return CALLS.first("exchanged_experts", given, experts.decides, run)[0]


def fake_exchanged_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor | None, sent: Tensor, home: Tensor, *matrices: Tensor | None,
    **attributes: Any,
) -> Tensor:  # fmt: skip
    """Shape and dtype of the result."""
    main = main_gradients.split(attributes)
    experts = Experts.of(matrices, **without(attributes, OF_BACKWARD))
    arguments = experts.sized(x, weights, expert_ids)
    if experts.quantized:
        check_fp8(arguments, experts.quantized)
    else:
        arguments.check()
    main_gradients.check(arguments, main, "exchanged_experts")
    return x.new_empty((x.shape[0], arguments.out_features), dtype=arguments.dtypes.result)


def in_turn(
    tokens: Tokens, experts: Experts, compute: Callable[[Tensor, Tensor | None, Plan], Tensor]
) -> tuple[Tensor, Tensor]:
    """By the operators that the pass `exchange` writes: what the kernels do not take.

    Args:
        tokens: what is sent.
        experts: for it.
        compute: of rows, their weights and their plan, what goes back.

    Returns:
        the result, and how many rows go back to each rank.
    """
    *_, weights, sent, home = tokens
    travel, back = experts.travel, experts.back
    begun = exchange.dispatch_start(*tokens, **travel)
    rows, ids, row_weights, came = exchange.dispatch_wait(*begun, *tokens, num_experts=experts.num_experts, **travel)  # type: ignore[arg-type]
    counts, offsets, slots, order = kernels.plan(ids, experts.here, room=experts.room)
    if experts.room is not None:
        came = exchange.came_within(came, counts, room=experts.room)
    y = compute(rows, None if weights is None else row_weights, (offsets, slots, order))
    given = (y, None, came, sent, home)
    result, _ = exchange.combine_wait(*exchange.combine_start(*given, **back), y, None, sent, home, **back)
    return result, came
