"""Rules for products and sums of rows at padded slots: grouped GEMMs, and the ways that rows go back to their tokens.

grouped_mm(rows, w, offs=ends)                            the product that it is for rows in sorted order
zeros(T + 1, H).index_add(0, token, rows)[:T]             the sum over each token's choices; a row for slots of none
zeros(T, H).index_add(0, token, rows)                     the same, where rows are zero at slots of none
back = zeros(T*K + 1, H); back[table] = rows; back[:T*K]  the rows, one for each assignment
"""

from __future__ import annotations

from typing import Any

from torch import fx

from moecompile.passes import radix, substitution
from moecompile.passes.bins import ends_of, is_bins
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Combine, Interpretation, Passed, Refused
from moecompile.passes.radix import difference, is_at_least
from moecompile.passes.rules_products import Casts, casts_of, einsum
from moecompile.passes.rules_views import free
from moecompile.passes.slots import (
    Bins,
    along_rows,
    bins_of,
    check_rows_known,
    is_tensor,
    kind_of,
    number,
    table_of,
    tensor,
)
from moecompile.passes.terms import Constant, Index, Looked, Offsets, Size, Special, Total, Value
from moecompile.passes.unify import without

# ---- products


def grouped_mm(call: Call, state: Interpretation) -> Value | None:
    """Rows at padded slots times their expert's matrix, by the ends of the padded bins."""
    rows, ends = state.value(call["input"]), state.value(tensor(call["offs"]))
    weight = tensor(call.arguments.get("mat2", call.arguments.get("weight")))
    bins = bins_of(rows.dims[0]) if rows.dims else None
    if bins is None:
        if is_bins(ends.content) and not isinstance(ends.content, Offsets):
            cause = state.first_refused(call["input"])
            reason = "a grouped GEMM with the ends of padded bins, over rows that are not at padded slots"
            raise Refused(reason if cause is None else state.refusals[cause])
        raise Passed
    weights = state.value(weight)
    if call.arguments.get("bias") is not None or len(rows.dims) != 2 or len(weights.dims) != 3:
        raise Refused("a grouped GEMM of padded rows that is not rows by stacked weights")
    if ends_of(ends) != bins.ends:
        raise Refused("a grouped GEMM whose offsets are not the ends of the bins that its rows were put into")
    return _product(call, state, bins, rows, weights, casts_of(state, call.node, call["input"], weight))


def _product(call: Call, state: Interpretation, bins: Bins, rows: Value, weights: Value, casts: Casts) -> Value | None:
    key, experts = bins.ends.key, bins.ends.num_experts
    assert key is not None
    if radix.group_size(weights.dims[0]) != experts or len(weights.dims[0]) > 1:
        raise Refused(f"a grouped GEMM of {radix.group_size(weights.dims[0])} experts with {experts} bins")
    content = weights.content
    if weights.dims[0]:
        content = substitution.substitute(content, weights.dims[0][0], Looked(key, experts))
    return einsum(state, call.node, rows, Value(weights.dims[1:], content), "sf,fn->sn", casts)


# ---- rows that go back to their tokens


def index_add(call: Call, state: Interpretation) -> Value | None:
    """index_add along the rows."""
    if call["alpha"] != 1 or call["dim"] not in (0, -2):
        raise Passed
    return added(call, state, state.value(call["index"]), call["source"])


def scatter_add(call: Call, state: Interpretation) -> Value | None:
    """scatter_add along the rows, by an index that is the same for all features."""
    index = along_rows(call, state)
    if state.shape(call["index"]) != state.shape(call["src"]):
        raise Passed
    return added(call, state, index, call["src"])


def added(call: Call, state: Interpretation, index: Value, source: fx.Node) -> Value | None:
    """base[token of slot] += row: a sum over each token's choices."""
    table, rows = table_of(index), state.value(source)
    if table is None:
        raise Passed
    if len(rows.dims) != 2 or rows.dims[0] != (table.atom,) or len(index.dims) != 1:
        raise Refused("rows added at the tokens of other slots")
    check_rows_known(rows.content, table.atom)
    token = table.inside
    over = without(table.atom.variable.group, token.atoms) if isinstance(token, Index) else None
    if over is None or not isinstance(token, Index) or state.dtype(source) != state.dtype(call.node):
        raise Refused("padded rows added at an index that is not their token's number, or in another dtype")
    value = Value((token.atoms, rows.dims[1]), Total(rows.content, over, state.dtype(source)))
    kept, outside = radix.group_size(token.atoms), table.outside
    within = outside is None or (is_at_least(kept, outside + 1) and is_at_least(outside, 0))
    if not within:
        return _with_spare(call, state, value, outside)
    if difference(state.shape(call["input"])[0], kept) != 0:
        raise Refused("rows added at an index that is not their token's number")
    fresh = state.value(call["input"]).content == Constant(0)
    state.combine(Combine(call.node, value, call["input"], fresh))
    return None


def put_back(call: Call, state: Interpretation, index: Value, source: Any) -> Value:
    """target[table] = rows: each padded row at its assignment's number, the others beyond the last."""
    table, rows = table_of(index), state.value(tensor(source))
    assert table is not None
    if not rows.dims or rows.dims[0] != (table.atom,) or len(index.dims) != 1:
        raise Refused("padded rows put back at the numbers of other rows")
    check_rows_known(rows.content, table.atom)
    if not isinstance(table.inside, Index) or table.inside.atoms != table.atom.variable.group:
        raise Refused("padded rows put back at numbers that are not one for each assignment")
    if state.dtype(source) != state.dtype(call["input"]) or state.shape(source)[1:] != state.shape(call["input"])[1:]:
        raise Refused("rows put into a tensor of another shape or dtype")
    return _with_spare(call, state, Value((table.inside.atoms, *rows.dims[1:]), rows.content), table.outside)


def _with_spare(call: Call, state: Interpretation, value: Value, outside: Size | None) -> Value:
    """The value's rows, and further rows at which those of unfilled slots end up."""
    made = state.calls.get(call["input"])
    rows, kept = state.shape(call["input"])[0], radix.group_size(value.dims[0])
    if made is None or made.name != "zeros" or number(state, call["input"]) != 0:
        raise Refused("padded rows collected in a tensor that is not new and zero")
    if outside is None or not is_at_least(outside, kept) or not is_at_least(rows, outside + 1):
        raise Refused("the rows of unfilled slots end up among those of tokens")
    dims = (free(rows, (call.node, "spare")), *value.dims[1:])
    return Value(dims, Special("spare", (value, call["input"] if call.inplace else None, call.node)))


def kept(call: Call, state: Interpretation, value: Value, stop: Size) -> Value | None:
    """The rows without the spare ones. Nobody else may see the tensor that has them, as this one takes its place."""
    assert isinstance(value.content, Special)
    inner, base, node = value.content.about
    rows = state.shape(call["input"])[0]
    if value.dims[:1] != (free(rows, (node, "spare")),):
        raise Refused("rows of tokens and of unfilled slots in another layout")
    if isinstance(stop, int) and stop < 0:
        stop = rows + stop
    if difference(stop, radix.group_size(inner.dims[0])) != 0:
        raise Refused("rows of tokens together with those of unfilled slots, or not all rows of tokens")
    names = [node] if base is None else [node, base]
    if {user for name in names for user in name.users if is_tensor(user)} - {node, call.node}:
        raise Refused(f"{node}, which has rows for unfilled slots, is used in several places")
    if isinstance(inner.content, Total):
        state.combine(Combine(call.node, inner))
        return None
    found: Value = inner
    return found


def narrow(call: Call, state: Interpretation) -> Value | None:
    """The first rows of a tensor with spare ones."""
    value = state.value(call["input"])
    if kind_of(value.content) != "spare" or call["dim"] not in (0, -len(value.dims)):
        raise Passed
    if call["start"] != 0:
        raise Refused("rows of tokens together with those of unfilled slots")
    return kept(call, state, value, state.number(call["length"]))
