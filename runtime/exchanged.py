"""Experts that are spread over ranks as one operator, from dispatch to combine, for graphs without a backward.

    result = exchanged_experts(x, expert_ids, weights, sent, home, w_in, w_out, ...)

computes what these do, one after the other, to the bit (`moecompile.runtime.exchange` says what each of them does):

    rows, ids, row_weights, came = dispatch(x, expert_ids, weights)
    y = experts(rows, row_weights, plan(ids), w_in, w_out, ...)        or experts_fp8
    result = combine(y, came)

Where moecompile's kernels exchange tokens, all of it is launched from a program of its own: to a host that would call
the operators one by one, few tokens' experts are as long on their way as on the device. Where tokens are many, the
exchange is hidden behind the experts (`moecompile.runtime.hopper_exchanged`), and in FP8 it is quantised tokens that
travel. All ranks have to do so or none: what decides is what they have agreed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moecompile.runtime import exchange, fp8_experts, kernels
from moecompile.runtime.autocast import exact
from moecompile.runtime.contract import Arguments
from moecompile.runtime.fp8_contract import check_fp8
from moecompile.runtime.hopper_exchange import Exchange
from moecompile.runtime.peer_memory import PeerMemory
from moecompile.runtime.remembered import CALLS

Tokens = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
"""x, expert_ids, weights, sent, home."""
OF_EXPERTS = 6
"""w_in, w_out, w_up, b_in, b_up, b_out."""
OF_EXCHANGE = ("ranks", "group", "capacity", "slot", "sms", "patience")
HIDES_FROM = 128
"""Tokens of a rank for each expert, on average, from which the exchange is hidden: a tile's rows. An expert's matrices
are read twice then, by its own rank's tokens and by the others': with fewer, to read them is what takes the time."""


def hides(ranks: int, capacity: int, top_k: int, num_experts: int) -> bool:
    """Whether an exchange of so many tokens a rank is hidden: the same answer on all ranks."""
    return ranks > 1 and capacity * top_k >= HIDES_FROM * num_experts


def exchanged_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor | None, sent: Tensor, home: Tensor, *matrices: Tensor | None,
    num_experts: int, quantized: Sequence[Tensor] = (), room: int | None = None, **attributes: Any,
) -> Tensor:  # fmt: skip
    """The result (T, H2).

    Args:
        x: (T, H).
        expert_ids: (T, K) integers, of all ranks' experts; -1 means no expert.
        weights: (T, K) or None.
        sent: of `exchange_plan`.
        home: likewise.
        matrices: w_in, w_out, w_up, b_in, b_up, b_out of this rank's experts, as of `experts`.
        num_experts: of all ranks.
        quantized: as of `experts_fp8`; empty for the model's precision.
        room: for so many rows of this rank's experts (`exchange.came_within`); None for all that there may be.
        attributes: of the exchange, of which that of the way back has the slot after `slot`; and of the experts.
    """
    travel = {name: attributes.pop(name) for name in OF_EXCHANGE}
    tokens, memory = (x, expert_ids, weights, sent, home), None
    if attributes.get("kernels") is None:
        where = travel["ranks"], travel["group"], travel["capacity"]
        memory = exchange.memory_for(*tokens[:3], *where, _bytes_back(tokens, matrices, attributes))
    call = tokens, matrices, num_experts, quantized, room, travel, attributes
    found = None if memory is None else _by_kernels(memory, *call)
    return _one_after_the_other(*call) if found is None else found


def _bytes_back(tokens: Tokens, matrices: Sequence[Tensor | None], attributes: dict[str, Any]) -> int:
    """Of a row that becomes of a token."""
    x, _, weights, sent, _ = tokens
    plan = sent, sent, sent  # there is none yet, and nothing asks for it
    args = Arguments(x, weights, *plan, *matrices, **attributes)  # type: ignore[arg-type]
    return args.out_features * args.dtypes.result.itemsize


def _by_kernels(
    memory: PeerMemory, tokens: Tokens, matrices: Sequence[Tensor | None], num_experts: int,
    quantized: Sequence[Tensor], room: int | None, travel: dict[str, Any], attributes: dict[str, Any],
) -> Tensor | None:  # fmt: skip
    """The result, if all of it is by kernels."""
    from moecompile.runtime import hopper_exchanged, hopper_in_turn

    absent = (None,) * (OF_EXPERTS - len(matrices))
    given = (*tokens, *matrices, *absent, *quantized, memory.own, memory.bases, memory.told)
    decides = {**attributes, **travel, "num_experts": num_experts, "room": room}
    known = CALLS.again("exchanged_experts", given, decides)
    if known is not None:
        return known[0]
    there, back = (
        Exchange(memory, travel["slot"] + way, travel["capacity"], travel["sms"], travel["patience"]) for way in (0, 1)
    )
    brought = hopper_exchanged.Brought(*tokens, num_experts, room)
    few = not hides(travel["ranks"], travel["capacity"], tokens[1].shape[1], num_experts)
    chosen = hopper_in_turn if few else hopper_exchanged
    if not chosen.takes(brought, there, matrices, quantized, attributes):
        return None

    def run() -> list[Tensor]:
        return [chosen.forward(brought, there, back, matrices, quantized, attributes)]

    with exact(tokens[0]):
        return CALLS.first("exchanged_experts", given, decides, run)[0]


def fake_exchanged_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor | None, sent: Tensor, home: Tensor, *matrices: Tensor | None,
    num_experts: int, quantized: Sequence[Tensor] = (), room: int | None = None, **attributes: Any,
) -> Tensor:  # fmt: skip
    """Shape and dtype of the result."""
    here = exchange.experts_here(num_experts, attributes["ranks"], "exchanged_experts")
    attributes = {name: value for name, value in attributes.items() if name not in OF_EXCHANGE}
    _, offsets, slots, order = kernels.fake_plan(expert_ids, here)
    arguments = Arguments(x, weights, offsets, slots, order, *matrices, **attributes)  # type: ignore[arg-type]
    if quantized:
        check_fp8(arguments, quantized)
    else:
        arguments.check()
    return x.new_empty((x.shape[0], arguments.out_features), dtype=arguments.dtypes.result)


def _one_after_the_other(
    tokens: Tokens, matrices: Sequence[Tensor | None], num_experts: int, quantized: Sequence[Tensor],
    room: int | None, travel: dict[str, Any], attributes: dict[str, Any],
) -> Tensor:  # fmt: skip
    """By the operators that the pass `exchange` writes: what the kernels do not take."""
    *_, weights, sent, home = tokens
    begun = exchange.dispatch_start(*tokens, **travel)
    rows, ids, row_weights, came = exchange.dispatch_wait(*begun, *tokens, num_experts=num_experts, **travel)  # type: ignore[arg-type]
    counts, offsets, slots, order = kernels.plan(ids, num_experts // travel["ranks"], room=room)
    if room is not None:
        came = exchange.came_within(came, counts, room=room)
        attributes["room"] = room
    args = (rows, None if weights is None else row_weights, offsets, slots, order, *matrices)
    if quantized:
        y = fp8_experts.experts_fp8(*args, quantized=quantized, **attributes)
    else:
        attributes.pop("scale_format", None)
        y = kernels.experts(*args, **attributes)
    back = {**travel, "slot": travel["slot"] + 1}
    given = (y, None, came, sent, home)
    result, _ = exchange.combine_wait(*exchange.combine_start(*given, **back), y, None, sent, home, **back)
    return result
