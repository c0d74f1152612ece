"""Rules for integers and masks over padded slots (passes/slots.py says what they mean).

table = full(C, total); table[slot] = order          a table, with `total` at slots of none
table // k, table % k, where(filled, table, n)       tables
table < total, table == total, table >= 0, ~mask     filled, unfilled
expert = searchsorted(ends, arange(C), right=True)   each slot's expert, once clamped to the last
rank = arange(C) - begin[expert]; rank < counts[expert]; arange(C) < ends[-1]
order[(first[expert] + rank).clamp(max=total - 1)]   a table that holds some row's number at slots of none
"""

from __future__ import annotations

from typing import Any

from torch import fx

from moecompile.passes import radix, rules_bins, terms
from moecompile.passes.aliases import fake_of
from moecompile.passes.bins import Numbers, before, combined, counts_of, first_rows, is_bins, numbers_of, plain
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Passed, Refused, Rule
from moecompile.passes.radix import difference, is_at_least
from moecompile.passes.rules_views import constant
from moecompile.passes.slots import (
    Bins,
    Table,
    bins_of,
    is_run,
    is_tensor,
    kind_of,
    mask_of,
    number,
    padded_atom,
    table_of,
    tensor,
    whole,
)
from moecompile.passes.terms import Atom, Index, Size, Special, Value, Variable


def _full(call: Call, state: Interpretation) -> Value:
    """full(size, symbolic number), for integers."""
    if not isinstance(call["fill_value"], fx.Node) or fake_of(call.node).dtype.is_floating_point:
        raise Passed
    found = number(state, call["fill_value"])
    if found is None:
        raise Passed
    return constant(Special("number", (found,)), state.shape(call.node), call.node)


# ---- arithmetic on tables


def _floor_divide(call: Call, state: Interpretation) -> Value | None:
    table = _table(call, state)
    if table is None or call.arguments.get("rounding_mode", "floor") != "floor":
        return _of_bins(call, state)
    return _digit(call, state, table, 0)


def _remainder(call: Call, state: Interpretation) -> Value | None:
    table = _table(call, state)
    return _digit(call, state, table, 1) if table is not None else _of_bins(call, state)


def _table(call: Call, state: Interpretation) -> Table | None:
    return table_of(state.value(call["input"])) if is_tensor(call["input"]) else None


def _of_bins(call: Call, state: Interpretation) -> Value | None:
    rule = rules_bins.RULES.get(call.name)
    if rule is None:
        raise Passed
    return rule(call, state)  # type: ignore[return-value]


def _digit(call: Call, state: Interpretation, table: Table, place: int) -> Value:
    """table // k (place 0) or table % k (place 1)."""
    divisor = state.number(call["other"])
    if not isinstance(table.inside, Index) or not isinstance(divisor, int) or divisor < 1:
        raise Refused("a table of padded slots divided by something that is not a number")
    high = radix.divide(radix.group_size(table.inside.atoms), divisor)
    groups = radix.regroup(table.inside.atoms, (high, divisor)) if high is not None else None
    if groups is None:
        raise Refused(f"assignment numbers divided by {divisor}, which is not a digit of theirs")
    outside = table.outside
    if isinstance(outside, int):
        outside = divmod(outside, divisor)[place]
    elif outside is not None:
        quotient = radix.divide(outside, divisor)
        if quotient is None:
            raise Refused("a table of padded slots whose number for unfilled ones does not divide")
        outside = (quotient, 0)[place]
    return Value(state.value(call["input"]).dims, Table(table.atom, Index(groups[place]), outside).content)


# ---- masks


def _compare(call: Call, state: Interpretation) -> Value:
    """Which slots hold a row, by a table, by their rank in their bin, or which lie in a bin at all."""
    table = _table(call, state)
    if table is not None:
        return _by_number(call, state, table)
    first, second = rules_bins.operand(call, state, "input"), rules_bins.operand(call, state, "other")
    left, right = call["input"], call["other"]
    if call.name in ("gt", "le"):  # a > b is b < a
        first, second, left, right = second, first, right, left
    if call.name in ("eq", "ne") or not is_tensor(left) or not is_tensor(right):
        raise Passed
    last = state.value(right).content
    if is_run(state.value(left)) and isinstance(last, Special) and last.kind == "last":
        bins = Bins(last.about[0], state.shape(left)[0])
        if call.name not in ("lt", "gt"):
            raise Refused("a comparison of slots with the end of the last bin that does not tell which lie in bins")
        return Value(state.value(left).dims, Special("binned", (bins,)))
    if first is None or second is None or "slots" not in (first.kind, second.kind):
        raise Passed
    return _by_rank(call.name in ("lt", "gt"), rules_bins.joined(first, second, -1))


def _by_rank(below: bool, rank: Numbers) -> Value:
    """rank - counts < 0 at filled slots, where each slot has searched its expert."""
    bins = bins_of(rank.dims[0]) if len(rank.dims) == 1 else None
    if bins is None or rank.at != Special("expert", (bins, True)):
        raise Refused("a comparison of rows' numbers that does not tell filled slots from unfilled ones")
    place = combined(plain(("place", rank.dims[0][0]), 1), before(bins.ends), -1)
    if rank.linear != combined(place, counts_of(bins.ends), -1):
        raise Refused("a comparison of rows' numbers that does not tell filled slots from unfilled ones")
    return Value(rank.dims, Special("filled" if below else "unfilled", (bins,)))


def _by_number(call: Call, state: Interpretation, table: Table) -> Value:
    """table < total, table == total, table >= 0, ..."""
    bound = whole(state, call["other"])
    bins = bins_of((table.atom,))
    if not isinstance(table.inside, Index) or table.outside is None or bins is None:
        raise Refused("a comparison of rows' numbers that does not tell filled slots from unfilled ones")
    above = _relation(call.name, table.outside, table.outside, bound)
    within = _relation(call.name, 0, radix.group_size(table.inside.atoms) - 1, bound)
    if above is None or within is None or above == within:
        raise Refused("a comparison of rows' numbers that does not tell filled slots from unfilled ones")
    return Value(state.value(call["input"]).dims, Special("filled" if within else "unfilled", (bins,)))


def _relation(name: str, low: Size, high: Size, bound: Size) -> bool | None:
    """Whether all numbers from low to high are in the relation to the bound, none is (False), or it is not known."""
    if name in ("ge", "lt"):
        yes, no = is_at_least(low, bound), is_at_least(bound, high + 1)
    elif name in ("gt", "le"):
        yes, no = is_at_least(low, bound + 1), is_at_least(bound, high)
    else:
        yes = low == high and difference(low, bound) == 0
        no = is_at_least(low, bound + 1) or is_at_least(bound, high + 1)
    if not (yes or no):
        return None
    return yes if name in ("ge", "gt", "eq") else no


def _invert(call: Call, state: Interpretation) -> Value:
    found = mask_of(state, call["input"])
    opposite = {"filled": "unfilled", "unfilled": "filled"}
    if found is None:
        raise Passed
    if str(state.dtype(call["input"])) != "torch.bool" or found[0] not in opposite:
        raise Refused("the opposite of a mask that does not tell filled slots from unfilled ones")
    return Value(state.value(call["input"]).dims, Special(opposite[found[0]], (found[1],)))


def _and(call: Call, state: Interpretation) -> Value | None:
    """filled & binned: filled."""
    first, second = mask_of(state, call["input"]), mask_of(state, call["other"])
    if first is None or second is None:
        if call.name == "bitwise_and":
            return _of_bins(call, state)
        raise Passed
    kinds = {first[0], second[0]}
    if (
        first[1] != second[1]
        or "unfilled" in kinds
        or {str(state.dtype(call[name])) for name in ("input", "other")} != {"torch.bool"}
    ):
        raise Refused("two masks that speak of different bins, or of unfilled slots, in one")
    name = "input" if first[0] == "filled" else "other"
    value = state.value(call[name])
    if state.shape(call.node) != state.shape(call[name]) or len(value.dims) != 1:
        raise Refused("two masks of padded slots in different layouts")
    return value


def _where(call: Call, state: Interpretation) -> Value:
    found = mask_of(state, call["condition"])
    if found is None or call["input"] is None:
        _check_unmasked(state, call["condition"], (call["input"], call["other"]))
        raise Passed
    kept, other = (call["input"], call["other"]) if found[0] == "filled" else (call["other"], call["input"])
    return _masked(call, state, kept, call["condition"], other)


def _check_unmasked(state: Interpretation, mask: Any, sides: tuple[Any, ...]) -> None:
    """Rows of padded slots are masked by what tells filled slots from unfilled ones, or not at all."""
    for side in sides:
        if is_tensor(side) and any(padded_atom(group) for group in state.value(side).dims):
            reason = state.refusals.get(mask, "rows of padded slots under a mask that does not tell which are filled")
            raise Refused(reason)


def _masked_fill(call: Call, state: Interpretation) -> Value:
    if mask_of(state, call["mask"]) is None:
        _check_unmasked(state, call["mask"], (call["input"],))
        raise Passed
    return _masked(call, state, call["input"], call["mask"], call["value"], "unfilled")


def _masked(call: Call, state: Interpretation, kept: Any, mask: fx.Node, other: Any, kind: str | None = None) -> Value:
    """kept at filled slots, a number at unfilled ones."""
    found = mask_of(state, mask)
    assert found is not None
    if found[0] == "binned" or (kind is not None and found[0] != kind):
        raise Refused("a mask that overwrites rows, or that leaves what stands at unfilled slots of the bins")
    kept = tensor(kept)
    value, dims = state.value(kept), state.value(mask).dims
    aligned = ((),) * (len(value.dims) - len(dims)) + dims
    repeats = [all(atom.variable.kind == "free" for atom in group) for group in aligned]
    masked = [own for own, repeated in zip(value.dims, repeats, strict=False) if not repeated]
    if len(aligned) != len(value.dims) or [bins_of(own) for own in masked] != [found[1]]:
        raise Refused("a mask of padded slots on rows that are not at these slots")
    if state.shape(call.node) != state.shape(kept) or state.dtype(call.node) != state.dtype(kept):
        raise Refused("a mask of padded slots that changes the rows' shape or dtype")
    fill = number(state, other)
    if fill is None:
        raise Refused("unfilled slots that are given something else than a number")
    table = table_of(value)
    if table is not None:
        return Value(value.dims, Table(table.atom, table.inside, whole(state, other)).content)
    if _is_position(value):
        if fill != 0:
            raise Refused("unfilled slots that are given a row's number other than 0")
        return Value(value.dims, Special("position", (value.dims[0][0],)))
    if not fake_of(kept).dtype.is_floating_point:
        raise Refused("integers of padded slots that are not the numbers of rows")
    return value


# ---- slots that search their expert


def _searchsorted(call: Call, state: Interpretation) -> Value:
    """searchsorted(ends, arange(C), right=True).

    The expert in whose bin a slot lies; the number of experts beyond the last.
    """
    bounds = call.arguments.get("sorted_sequence", call.arguments.get("boundaries"))
    ends, slots = state.value(bounds), state.value(tensor(call["input"]))
    if not is_bins(ends.content) or isinstance(ends.content, terms.Offsets):
        raise Passed
    found = numbers_of(ends)
    right = call["right"] is True or call.arguments.get("side") == "right"
    symbols = list(found.linear.terms) if found is not None else []
    if found is None or len(symbols) != 1 or symbols[0][0][0] != "block_ends" or symbols[0][0][1] != symbols[0][1]:
        raise Refused("slots that search something other than the ends of bins rounded up to a block")
    if not right or not is_run(slots) or call.arguments.get("sorter") is not None:
        raise Refused("slots that search the ends of bins in a way that does not give their expert")
    bins = Bins(found.linear, state.shape(call["input"])[0])
    atom = Atom(Variable("searched", bins), 1, bins.capacity)
    return Value(((atom,),), Special("expert", (bins, False)))


def _clamp(call: Call, state: Interpretation) -> Value | None:
    """A slot's expert clamped to the last one, or its row's number to the last row.

    What they are at filled slots stays.
    """
    value = state.value(tensor(call["input"]))
    low, high = call.arguments.get("min"), call.arguments.get("max")
    if call.name == "minimum":
        low, high = None, call["other"]
    if kind_of(value.content) == "expert":
        assert isinstance(value.content, Special)
        bins: Bins = value.content.about[0]
        if low not in (None, 0) or high is None or difference(whole(state, high), bins.ends.num_experts - 1) != 0:
            raise Refused("slots beyond the last bin, given to other experts than the last")
        return Value(value.dims, Special("expert", (bins, True)))
    if _is_position(value):
        (atom,) = value.dims[0]
        rows = radix.product(part.size for part in _rows_counted(atom))
        if low not in (None, 0) or high is None or difference(whole(state, high), rows - 1) != 0:
            raise Refused("rows' numbers clamped to something other than the last row")
        return Value(value.dims, Special("position", (atom,)))
    if call.name == "minimum":
        raise Passed
    return _of_bins(call, state)


def _rows_counted(atom: Atom) -> tuple[Atom, ...]:
    """The assignments that the bins' counts count."""
    key = atom.variable.key.ends.key
    assert isinstance(key, terms.Element)
    return tuple(part for part in key.index if isinstance(part, Atom))


def _is_position(value: Value) -> bool:
    """Whether the value is, at filled slots, the place of their row in the sorted order."""
    bins = bins_of(value.dims[0]) if len(value.dims) == 1 else None
    found = numbers_of(value)
    if bins is None or found is None or found.at != Special("expert", (bins, True)):
        return False
    place = combined(plain(("place", value.dims[0][0]), 1), before(bins.ends), -1)
    return found.linear == combined(first_rows(bins.ends), place, 1)


RULES: dict[str, Rule] = {
    **rules_bins.RULES,
    "full": _full,
    "full_like": _full,
    "new_full": _full,
    "floor_divide": _floor_divide,
    "div": _floor_divide,
    "remainder": _remainder,
    **{name: _compare for name in ("eq", "ne", "lt", "gt", "le", "ge")},
    "invert": _invert,
    "bitwise_and": _and,
    "logical_and": _and,
    "where": _where,
    "where_method": _where,
    "masked_fill": _masked_fill,
    "searchsorted": _searchsorted,
    "bucketize": _searchsorted,
    "clamp": _clamp,
    "clamp_max": _clamp,
    "minimum": _clamp,
}
