"""Rules for whole numbers about the segments of rows that ranks exchange, and for the order that they bring rows into.

    ends   = came.view(R, -1).t().reshape(-1).cumsum(0)          where segments end, sorted by expert (`Tally`)
    p      = arange(rows)                                        along `order`: the rows, sorted by their expert
    where  = searchsorted(ends, p, right=True)                   `Segment`; or arange(E).repeat_interleave(sizes)
    place  = p + (begins - begins by expert)[where]              where each of them lies among those that came
    order  = (arange(E) % (E / R)).repeat_interleave(came).argsort()      the same by a sort

passes/token_exchange.py says what the terms are, passes/rules_exchange.py what becomes of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from moecompile.passes import radix
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Passed, Refused, Rule
from moecompile.passes.terms import Atom, Content, Group, Index, Value, Variable
from moecompile.passes.token_exchange import COUNT, POSITION, Exchange, Own, Segment, Tally, Term, as_place, tally
from moecompile.passes.unify import unify

NUMBERS = (torch.int32, torch.int64)
"""Dtypes that hold any number of rows."""
_OTHER_LENGTHS = "numbers repeated as often as something else than the sizes of segments, sorted by expert"


def in_order(dims: Sequence[Group], experts: int) -> bool:
    """Whether dimensions run through all experts as they are counted."""
    atoms = radix.merge(atom for group in dims for atom in group)
    return len(atoms) == 1 and atoms[0].variable.kind == "free" and atoms[0][1:] == (1, experts)


def _cumsum(call: Call, state: Interpretation) -> Value:
    """Where segments end."""
    value = state.value(call["input"])
    if not isinstance(value.content, Tally):
        raise Passed
    exchange, all_terms = value.content.exchange, value.content.terms
    whole = value.dims in ((exchange.by_rank,), (exchange.by_expert,))
    if not whole or all_terms != frozenset([(COUNT, 1)]) or state.dtype(call.node) not in NUMBERS:
        raise Refused("a running sum of something else than the sizes of all segments")
    return Value(value.dims, tally(exchange, [(value.dims[0], 1)]))


def _arithmetic(call: Call, state: Interpretation) -> Value:
    """Sums and differences of such numbers, and of a row's position."""
    arguments = [call["input"], call["other"]]
    values = [state.value(each) for each in arguments if isinstance(each, fx.Node) and _is_tensor(each)]
    tallies = [value.content for value in values if isinstance(value.content, Tally)]
    if not tallies:
        raise Passed
    if len(values) != 2 or call["alpha"] != 1 or state.dtype(call.node) not in NUMBERS:
        raise Refused("numbers of segments with something else than such numbers")
    exchange, (dims, contents) = tallies[0].exchange, unify(values)
    signs = (1, -1 if call.name == "sub" else 1)
    terms = [
        (term, sign * factor)
        for content, sign in zip(contents, signs, strict=True)
        for term, factor in _terms(content, exchange, dims)
    ]
    at_rows = {content.at_rows for content in contents if isinstance(content, Tally)}
    if len(at_rows) > 1:
        raise Refused("numbers of rows with numbers of segments")
    found = tally(exchange, terms, at_rows.pop())
    return Value(dims, as_place(found, dims[0][0]) if found.at_rows else found)


def _terms(content: Content, exchange: Exchange, dims: tuple[Group, ...]) -> Sequence[tuple[Term, int]]:
    if isinstance(content, Tally) and content.exchange == exchange:
        return [*content.terms]
    if isinstance(content, Index) and dims == (content.atoms,) and _is_row(content.atoms, exchange):
        return [(POSITION, 1)]
    raise Refused("numbers of segments with something else than such numbers")


def _is_row(group: Group, exchange: Exchange) -> bool:
    """Whether a dimension runs over the rows that arrived, sorted by expert."""
    return len(group) == 1 and group == (exchange.in_order(group[0].size),)


def _is_tensor(argument: Any) -> bool:
    return isinstance(fake_of(argument), torch.Tensor)


def _searchsorted(call: Call, state: Interpretation) -> Value:
    """The segment of each row, found by where segments end."""
    ends, rows = state.value(call["sorted_sequence"]), state.value(call["input"])
    if not isinstance(ends.content, Tally):
        raise Passed
    exchange = ends.content.exchange
    if ends != Value((exchange.by_expert,), tally(exchange, [(exchange.by_expert, 1)])):
        raise Refused("segments searched by something else than their ends, sorted by expert")
    if call["sorter"] is not None or not (call["right"] is True or call["side"] == "right"):
        raise Refused("segments searched that do not begin with the row that is searched")
    if not isinstance(rows.content, Index) or not _is_counted(rows):
        raise Refused("segments searched of something else than the rows in order")
    return Value(((exchange.in_order(rows.content.atoms[0].size),),), Segment(exchange))


def _is_counted(value: Value) -> bool:
    """Whether the value is 0, 1, 2, ..."""
    content = value.content
    counts = isinstance(content, Index) and value.dims == (content.atoms,) and len(content.atoms) == 1
    return counts and value.dims[0][0].variable.kind == "free" and value.dims[0][0].divisor == 1


def _repeat_interleave(call: Call, state: Interpretation) -> Value:
    """The segment of each row, or a number about it, repeated as often as the segment has rows."""
    sizes = call["repeats"]
    lengths = state.value(sizes) if isinstance(sizes, fx.Node) and _is_tensor(sizes) else None
    if lengths is None or not isinstance(lengths.content, Tally):
        raise Passed
    exchange, value = lengths.content.exchange, state.value(call["input"])
    if lengths.content != tally(exchange, [(COUNT, 1)]) or call["dim"] not in (None, 0, -1):
        raise Refused(_OTHER_LENGTHS)
    (size,) = state.shape(call.node)
    if _is_expert(value, exchange) and lengths.dims == (exchange.by_rank,):
        return Value(((exchange.arrived(size),),), Own(exchange))
    if lengths.dims != (exchange.by_expert,):
        raise Refused(_OTHER_LENGTHS)
    dims = ((exchange.in_order(size),),)
    if isinstance(value.content, Index) and _is_counted(value) and value.dims[0][0].size == exchange.num_experts:
        return Value(dims, Segment(exchange))
    return Value(dims, _at_rows(value, exchange))


def _is_expert(value: Value, exchange: Exchange) -> bool:
    """Whether the value is each segment's expert, as segments come: 0, 1, ..., E - 1, modulo the experts of a rank."""
    if len(value.dims) != 1 or not in_order(value.dims, exchange.num_experts):
        return False
    (whole,) = value.dims[0]
    return value.content == Index(radix.merge([Atom(whole.variable, 1, exchange.here)]))


def _sort(call: Call, state: Interpretation) -> tuple[Value, Value]:
    """Rows that have arrived, sorted by their experts, in any order within one expert."""
    value = state.value(call["input"])
    if not isinstance(value.content, Own):
        raise Passed
    (arrived,) = value.dims[0] if len(value.dims) == 1 and len(value.dims[0]) == 1 else (None,)
    if arrived is None or arrived != value.content.exchange.arrived(arrived.size) or call["descending"]:
        raise Refused("a sort of rows' experts that is not of all rows that came, from the first expert on")
    order = ((Atom(Variable("order", call.node, (arrived,), value.content), 1, arrived.size),),)
    return Value(order, value.content), Value(order, Index((arrived,)))


def _argsort(call: Call, state: Interpretation) -> Value:
    return _sort(call, state)[1]


def _at_rows(value: Value, exchange: Exchange) -> Content:
    """A number about each segment, at each row."""
    content = value.content
    if not isinstance(content, Tally) or content.at_rows or content.exchange != exchange:
        raise Refused("something else than numbers of segments, at each row")
    if value.dims != (exchange.by_expert,):
        raise Refused("numbers of segments that are not sorted by expert, at each row of such")
    return tally(exchange, content.terms, at_rows=True)


def _getitem(call: Call, state: Interpretation) -> Value:
    source, index = call["input"], call["index"]
    if source in state.results or not isinstance(source, fx.Node) or not _is_tensor(source):
        raise Passed
    value = state.value(source)
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if not isinstance(value.content, Tally) or not isinstance(index, fx.Node):
        raise Passed
    return _of_segment(value, state.value(index))


def _of_segment(value: Value, index: Value) -> Value:
    assert isinstance(value.content, Tally)
    exchange = value.content.exchange
    if index.content != Segment(exchange) or len(index.dims) != 1 or not _is_row(index.dims[0], exchange):
        raise Refused("numbers of segments, read otherwise than at each row, sorted by expert")
    return Value(index.dims, _at_rows(value, exchange))


def _index_select(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    if not isinstance(value.content, Tally) or call["dim"] not in (0, -1):
        raise Passed
    return _of_segment(value, state.value(call["index"]))


RULES: dict[str, Rule] = {
    "cumsum": _cumsum,
    "add": _arithmetic,
    "sub": _arithmetic,
    "searchsorted": _searchsorted,
    "sort": _sort,
    "argsort": _argsort,
    "repeat_interleave": _repeat_interleave,
    "getitem": _getitem,
    "index_select": _index_select,
}
