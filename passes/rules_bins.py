"""Rules for whole numbers about the experts' rows.

Arithmetic on counts, bins and slots (passes/bins.py says what they are).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moecompile.passes import radix
from moecompile.passes.aliases import fake_of
from moecompile.passes.bins import (
    ONE,
    Linear,
    Numbers,
    before,
    bounded_below,
    combined,
    content_of,
    floored,
    is_bins,
    is_slots,
    is_whole_order,
    numbers_of,
    plain,
    scaled,
    summed,
)
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Passed, Refused, Rule
from moecompile.passes.rules_views import free, holds_integers
from moecompile.passes.terms import Count, Special, Value


def operand(call: Call, state: Interpretation, name: str) -> Numbers | None:
    """An argument as such numbers, or None."""
    argument = call[name]
    if isinstance(argument, int) or (isinstance(argument, fx.Node) and isinstance(fake_of(argument), torch.Tensor)):
        return numbers_of(state.value(argument))
    return None


def _concerns(call: Call, state: Interpretation, names: tuple[str, ...]) -> bool:
    contents = [state.values[call[name]].content for name in names if call[name] in state.values]
    return any(is_bins(content) or is_slots(content) for content in contents)


def _exactly(call: Call, state: Interpretation) -> None:
    if not holds_integers(state.dtype(call.node)):
        raise Passed


def _number(call: Call, state: Interpretation, name: str) -> int:
    found = operand(call, state, name)
    if found is None or found.kind != "plain":
        raise Refused("the experts' counts or bins times, or divided by, something that is not a number")
    return dict(found.linear.terms).get(ONE, 0)


def _result(call: Call, state: Interpretation, found: Numbers) -> Value:
    if state.shape(call.node) != tuple(radix.group_size(group) for group in found.dims):
        raise Refused("the experts' counts or bins in another shape")
    return Value(found.dims, content_of(found.linear, found.at))


def joined(first: Numbers, second: Numbers, factor: int) -> Numbers:
    """first + factor * second, where both speak of the same experts or the same rows."""
    kinds = (first.kind, second.kind)
    if "run" in kinds and "slots" in kinds:
        slots = first if first.kind == "slots" else second
        group = slots.dims[0] if len(slots.dims) == 1 else ()
        if len(group) != 1 or not (is_whole_order(group[0]) or group[0].variable.kind == "searched"):
            raise Refused("numbers 0, 1, 2, ... added to numbers of rows that are not in a sorted order")
        symbol = "place" if group[0].variable.kind == "searched" else "row"
        row = Numbers(slots.dims, plain((symbol, group[0]), 1))
        first, second = (row, second) if first.kind == "run" else (first, row)
        kinds = (first.kind, second.kind)
    linear = combined(first.linear, second.linear, factor)
    if "plain" in kinds:
        other = first if second.kind == "plain" else second
        return Numbers(other.dims, linear, other.at)
    owners = [numbers for numbers in (first, second) if numbers.linear.key is not None]
    same = len({(owner.linear.key, owner.linear.num_experts, owner.at) for owner in owners}) == 1
    if kinds == ("bins", "bins") and same:
        return Numbers(first.dims, linear)
    if set(kinds) <= {"slots", "row", "place"} and "slots" in kinds and same and first.dims == second.dims:
        return Numbers(first.dims, linear, owners[0].at)
    raise Refused("arithmetic of numbers that speak of different experts, or of rows in different orders")


def _add(call: Call, state: Interpretation) -> Value:
    if call.arguments.get("alpha", 1) != 1 or not _concerns(call, state, ("input", "other")):
        raise Passed
    _exactly(call, state)
    first, second = operand(call, state, "input"), operand(call, state, "other")
    if first is None or second is None:
        raise Refused("arithmetic of the experts' counts or bins with something else")
    if call.name == "rsub":
        first, second = second, first
    return _result(call, state, joined(first, second, 1 if call.name == "add" else -1))


def _mul(call: Call, state: Interpretation) -> Value:
    if not _concerns(call, state, ("input", "other")):
        raise Passed
    _exactly(call, state)
    name, other = ("input", "other") if _concerns(call, state, ("input",)) else ("other", "input")
    return _mapped(call, state, name, lambda linear: scaled(linear, _number(call, state, other)))


def _mapped(call: Call, state: Interpretation, name: str, function: Callable[[Linear], Linear]) -> Value:
    if not _concerns(call, state, (name,)):
        raise Passed
    _exactly(call, state)
    found = operand(call, state, name)
    if found is None:
        raise Refused("the experts' counts or bins in another order than the experts'")
    return _result(call, state, Numbers(found.dims, function(found.linear), found.at))


def _neg(call: Call, state: Interpretation) -> Value:
    return _mapped(call, state, "input", lambda linear: scaled(linear, -1))


def _divisor(number: int) -> int:
    if number < 1:
        raise Refused(f"the experts' counts or bins divided by {number}")
    return number


def _floor_divide(call: Call, state: Interpretation) -> Value:
    mode = call.arguments.get("rounding_mode", "floor")
    if mode is None:
        return _ratio(call, state)

    def divided(linear: Linear) -> Linear:
        if mode != "floor" and any(factor < 0 for _, factor in linear.terms):
            raise Refused("a division that rounds towards zero, of what may be negative")
        return floored(linear, _divisor(_number(call, state, "other")))

    return _mapped(call, state, "input", divided)


def _ratio(call: Call, state: Interpretation) -> Value:
    """counts / block, to be rounded: exact enough, as float32 tells a whole quotient from any other up to 2**24."""
    found, by = operand(call, state, "input"), call["other"]
    if not _concerns(call, state, ("input",)) or found is None or found.kind != "bins":
        raise Passed
    if not isinstance(by, int) or by < 1 or state.dtype(call.node) not in (torch.float32, torch.float64):
        raise Passed
    return Value(found.dims, Special("ratio", (found.linear, by)))


def _ceil(call: Call, state: Interpretation) -> Value:
    """ceil(counts / block) = -floor(-counts / block)."""
    content = state.value(call["input"]).content
    if not isinstance(content, Special) or content.kind != "ratio":
        raise Passed
    linear, by = content.about
    dims = state.value(call["input"]).dims
    return _result(call, state, Numbers(dims, scaled(floored(scaled(linear, -1), by), -1)))


def _cast(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    if (
        not (is_bins(value.content) or is_slots(value.content))
        or fake_of(call.node).device != fake_of(call["input"]).device
    ):
        raise Passed
    if not (holds_integers(state.dtype(call["input"])) and holds_integers(state.dtype(call.node))):
        raise Passed
    return value


def _modulo(linear: Linear, divisor: int) -> Linear:
    return combined(linear, floored(linear, divisor), -divisor)


def _remainder(call: Call, state: Interpretation) -> Value:
    return _mapped(call, state, "input", lambda linear: _modulo(linear, _divisor(_number(call, state, "other"))))


def _clamp(call: Call, state: Interpretation) -> Value:
    minimum = call.arguments.get("other", call.arguments.get("min"))
    if call.arguments.get("max") is not None or not isinstance(minimum, int):
        raise Passed
    return _mapped(call, state, "input", lambda linear: bounded_below(linear, minimum))


def _bitwise_and(call: Call, state: Interpretation) -> Value:
    def masked(linear: Linear) -> Linear:
        mask = _number(call, state, "other")
        block = -mask if mask < 0 else mask + 1
        if block & (block - 1):
            raise Refused(f"the experts' counts or bins masked by {mask}, which is not a block's")
        return scaled(floored(linear, block), block) if mask < 0 else _modulo(linear, block)

    return _mapped(call, state, "input", masked)


def _shift(call: Call, state: Interpretation) -> Value:
    def shifted(linear: Linear) -> Linear:
        power = 1 << _divisor(_number(call, state, "other"))
        return scaled(linear, power) if call.name == "bitwise_left_shift" else floored(linear, power)

    return _mapped(call, state, "input", shifted)


def _cumsum(call: Call, state: Interpretation) -> Value:
    if call["dim"] not in (0, -1):
        raise Passed
    value = state.value(call["input"])
    return _mapped(call, state, "input", summed) if is_bins(value.content) else _passed()


def _passed() -> Value:
    raise Passed


def part(value: Value, item: Any) -> Value | None:
    """ends[:-1], the experts' numbers but the last, or ends[-1], the last; None for other parts."""
    found = numbers_of(value)
    if found is None or found.kind != "bins" or not isinstance(found.linear.num_experts, int):
        return None
    last = found.linear.num_experts - 1
    if isinstance(item, int) and item in (-1, last) and not isinstance(value.content, Count):
        return Value((), Special("last", (found.linear,)))
    if item in (slice(None, -1), slice(0, -1), slice(None, last), slice(0, last)) and last > 0:
        return Value((free(last, ("leading", found.linear)),), Special("leading", (found.linear,)))
    return None


def begins(call: Call, state: Interpretation, rest: fx.Node) -> Value:
    """A zero before ends[:-1]: where each expert's rows, or its bin, begin."""
    value = state.value(rest)
    content = value.content
    if not isinstance(content, Special) or content.kind != "leading" or len(value.dims) != 1:
        raise Passed
    linear = content.about[0]
    if value.dims != (free(linear.num_experts - 1, ("leading", linear)),):
        raise Refused("where the experts' rows end, in another order than the experts'")
    return Value((free(linear.num_experts, (call.node, "expert")),), content_of(before(linear), None))


RULES: dict[str, Rule] = {
    "add": _add,
    "sub": _add,
    "rsub": _add,
    "mul": _mul,
    "neg": _neg,
    "floor_divide": _floor_divide,
    "div": _floor_divide,
    "remainder": _remainder,
    "ceil": _ceil,
    "cast": _cast,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "maximum": _clamp,
    "bitwise_and": _bitwise_and,
    "bitwise_left_shift": _shift,
    "bitwise_right_shift": _shift,
    "cumsum": _cumsum,
}
