"""Rules for models that exchange tokens between the ranks of their experts themselves, as torchtitan's do.

    came  = all_to_all(counts.view(R, -1))                      segments of what arrives (passes/token_exchange.py)
    ins   = counts.view(R, -1).sum(1).tolist()                  `Leaving`, one number a rank
    outs  = came.view(R, -1).sum(1).tolist()                    `Arriving`
    rows  = all_to_all(x[order // k], outs, ins)                dims (arrived), (h): `Sent`, what it was
    rows  = rows[place]                                         dims (order), (h), sorted by `Own`: products follow
    back[place] = y                                             dims (arrived), (h) again
    y     = all_to_all(back, ins, outs)                         dims of x[order // k]; what was `Sent` is home

What the rank computes in between is at home a function of the assignment alone, if its parts are `Sent` rows, numbers,
and tensors that are looked up by the row's expert: then expert e of all ranks is what the rank that has it calls
e % (E / R). Anything else of this rank would be another tensor for each row's rank: it refuses the way back. So do a
second exchange inside, another group, and rows that were sorted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, fx

from moecompile.passes import radix
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Passed, Refused, Rule, is_plain, walk
from moecompile.passes.rules_routing import known_range
from moecompile.passes.rules_views import free, reshaped
from moecompile.passes.site import Spread
from moecompile.passes.terms import (
    Affine,
    Apply,
    Atom,
    Constant,
    Content,
    Contract,
    Count,
    Element,
    Group,
    Index,
    Looked,
    Value,
    Variable,
)
from moecompile.passes.token_exchange import (
    COUNT,
    POSITION,
    Arriving,
    Exchange,
    Leaving,
    Own,
    Segment,
    Sent,
    Tally,
    Term,
    as_place,
    tally,
)
from moecompile.passes.unify import run_once_through, unify
from moecompile.runtime.sharded import process_group

_NUMBERS = (torch.int32, torch.int64)


def _all_to_all(call: Call, state: Interpretation) -> Value:
    value = state.value(call["input"])
    ranks = _ranks_of(call)
    first = value.dims[0][0] if value.dims and len(value.dims[0]) == 1 else None
    if isinstance(value.content, Count):
        return _counts(call, state, value, value.content, ranks)
    if first is not None and first.variable.kind == "arrived":
        if first != first.variable.key.arrived(state.shape(call["input"])[0]):
            raise Refused("only some of the rows that came are sent back")
        return _home(call, state, value, first.variable.key)
    if first is not None and first.variable.kind == "order":
        return _sent(call, state, value, first)
    raise Passed


def _ranks_of(call: Call) -> int:
    """How many ranks exchange."""
    if not isinstance(call["group_name"], str):
        raise Refused("an exchange between ranks of a group without a name")
    ranks = distributed.get_world_size(process_group(call["group_name"]))
    for name in ("input_split_sizes", "output_split_sizes"):
        if not isinstance(call[name], (list, tuple)) or len(call[name]) != ranks:
            raise Refused(f"an exchange between {ranks} ranks of another number of parts")
    return ranks


def _wait(call: Call, state: Interpretation) -> Value | None:
    """An exchange that is over."""
    value = state.value(call["tensor"])
    return None if is_plain(value) else value


# ---- numbers of rows


def _counts(call: Call, state: Interpretation, value: Value, counts: Count, ranks: int) -> Value:
    """The counts of all experts, each rank's to that rank."""
    key, experts = counts.key, counts.num_experts
    shape = state.shape(call["input"])
    if not isinstance(experts, int) or experts % ranks or not isinstance(key, Element) or ranks < 2:
        raise Refused(f"counts of {experts} experts, exchanged between {ranks} ranks")
    if not _in_order(value.dims, experts):
        raise Refused("the experts' counts, exchanged in another order than the experts'")
    parts = [radix.divide(shape[0], ranks)] * ranks
    if list(call["input_split_sizes"]) != parts or list(call["output_split_sizes"]) != parts:
        raise Refused("the experts' counts, exchanged in parts that are not each rank's own")
    if state.dtype(call["input"]) not in _NUMBERS:
        raise Refused(f"the experts' counts, exchanged in {state.dtype(call['input'])}")
    known = known_range(key, state)
    if known is None or known > experts:
        raise Refused("ranks exchange rows of ids which may name no expert")
    exchange = Exchange(key, experts, ranks, call["group_name"])
    return reshaped(Value((exchange.by_rank,), tally(exchange, [(COUNT, 1)])), state.shape(call.node))


def _in_order(dims: Sequence[Group], experts: int) -> bool:
    """Whether dimensions run through all experts as they are counted."""
    atoms = radix.merge(atom for group in dims for atom in group)
    return len(atoms) == 1 and atoms[0].variable.kind == "free" and atoms[0][1:] == (1, experts)


def _sum(call: Call, state: Interpretation) -> Value:
    """Of counts: the assignments of each rank, or of each expert."""
    value = state.value(call["input"])
    if len(value.dims) != 2 or not isinstance(value.content, (Count, Tally)):
        raise Passed
    dim = call["dim"][0] if isinstance(call["dim"], (list, tuple)) and len(call["dim"]) == 1 else call["dim"]
    if not isinstance(dim, int) or call["keepdim"] or state.dtype(call.node) not in _NUMBERS:
        raise Refused("counts of ranks and experts, summed otherwise than to whole numbers, over one of both")
    summed, left = value.dims[dim], value.dims[1 - dim % 2]
    if isinstance(value.content, Count):
        return _leaving(call, value, value.content, dim % 2)
    exchange, terms = value.content.exchange, value.content.terms
    if terms != frozenset([(COUNT, 1)]) or value.content.at_rows:
        raise Refused("a sum over segments of something else than their sizes")
    if (summed, left) == (radix.merge([exchange.rank]), radix.merge([exchange.expert])):
        return Value((free(exchange.here, call.node),), Count(Own(exchange), exchange.here))
    if (left, summed) == (radix.merge([exchange.rank]), radix.merge([exchange.expert])):
        return Value((free(exchange.ranks, call.node),), Arriving(exchange))
    raise Refused("a sum over segments that is neither over ranks nor over experts")


def _leaving(call: Call, value: Value, counts: Count, dim: int) -> Value:
    key, experts = counts.key, counts.num_experts
    if not isinstance(key, Element) or not isinstance(experts, int) or not _in_order(value.dims, experts) or dim != 1:
        raise Passed
    ranks = radix.group_size(value.dims[0])
    assert isinstance(ranks, int)
    return Value((free(ranks, call.node),), Leaving(key, experts, ranks))


def _item(call: Call, state: Interpretation) -> None:
    """One rank's number, read on the host."""
    content = state.value(call["input"]).content
    if not isinstance(content, (Leaving, Arriving)) or content.rank is None:
        raise Passed
    state.numbers[call.node] = content


def _cast(call: Call, state: Interpretation) -> Value:
    """Whole numbers in another dtype, or on another device."""
    value = state.value(call["input"])
    if not isinstance(value.content, (Leaving, Arriving, Tally, Segment)):
        raise Passed
    if state.dtype(call.node) not in _NUMBERS:
        raise Refused(f"numbers of rows in {state.dtype(call.node)}")
    return value


# ---- places of rows


def _cumsum(call: Call, state: Interpretation) -> Value:
    """Where segments end."""
    value = state.value(call["input"])
    if not isinstance(value.content, Tally):
        raise Passed
    exchange, all_terms = value.content.exchange, value.content.terms
    whole = value.dims in ((exchange.by_rank,), (exchange.by_expert,))
    if not whole or all_terms != frozenset([(COUNT, 1)]) or state.dtype(call.node) not in _NUMBERS:
        raise Refused("a running sum of something else than the sizes of all segments")
    return Value(value.dims, tally(exchange, [(value.dims[0], 1)]))


def _arithmetic(call: Call, state: Interpretation) -> Value:
    """Sums and differences of such numbers, and of a row's position."""
    arguments = [call["input"], call["other"]]
    values = [state.value(each) for each in arguments if isinstance(each, fx.Node) and _is_tensor(each)]
    tallies = [value.content for value in values if isinstance(value.content, Tally)]
    if not tallies:
        raise Passed
    if len(values) != 2 or call["alpha"] != 1 or state.dtype(call.node) not in _NUMBERS:
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


_OTHER_LENGTHS = "numbers repeated as often as something else than the sizes of segments, sorted by expert"


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
    if len(value.dims) != 1 or not _in_order(value.dims, exchange.num_experts):
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
    if isinstance(value.content, (Leaving, Arriving)):
        return _of_rank(value, value.content, index)
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if not isinstance(value.content, Tally) or not isinstance(index, fx.Node):
        raise Passed
    return _of_segment(value, state.value(index))


def _of_rank(value: Value, content: Leaving | Arriving, index: Any) -> Value:
    ranks = content.ranks if isinstance(content, Leaving) else content.exchange.ranks
    if type(index) is not int or not 0 <= index < ranks or len(value.dims) != 1 or content.rank is not None:
        raise Refused("numbers of rows, read otherwise than one rank's at a time")
    if isinstance(content, Leaving):
        return Value((), Leaving(content.key, content.num_experts, content.ranks, index))
    return Value((), Arriving(content.exchange, index))


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


# ---- rows


def _sent(call: Call, state: Interpretation, value: Value, order: Atom) -> Value:
    """Rows sorted by expert, each to the rank of its expert."""
    exchange = _exchange_of(call, state, arriving="output_split_sizes", leaving="input_split_sizes")
    if order.variable.by != exchange.key:
        raise Refused("ranks exchange rows that are sorted by other ids than those that are counted")
    whole = order.divisor == 1 and order.size == radix.group_size(order.variable.group)
    if not whole or not run_once_through([order.variable.group], exchange.key):
        raise Refused("ranks exchange rows that are not in a sorted order of all assignments")
    if any(isinstance(inner, (Sent, Own)) for inner in walk(value.content)):
        raise Refused("rows that have been exchanged are exchanged once more")
    _check_gradient(call)
    if not fake_of(call.node).dtype.is_floating_point or isinstance(value.content, (Index, Constant)):
        raise Refused("ranks exchange sorted numbers that are not rows")
    size = state.shape(call.node)[0]
    return Value(((exchange.arrived(size),), *value.dims[1:]), Sent(exchange, order, value.content))


def _exchange_of(call: Call, state: Interpretation, arriving: str, leaving: str) -> Exchange:
    """The exchange that these numbers of rows belong to."""
    found = [state.numbers.get(size) if isinstance(size, fx.Node) else None for size in call[arriving]]
    exchange = found[0].exchange if isinstance(found[0], Arriving) else None
    if exchange is None or found != [Arriving(exchange, rank) for rank in range(exchange.ranks)]:
        raise Refused("ranks exchange rows by numbers that are not those of the assignments that come from each rank")
    if exchange.group != call["group_name"]:
        raise Refused("rows are exchanged in another group of ranks than their numbers")
    numbers = [state.numbers.get(size) if isinstance(size, fx.Node) else None for size in call[leaving]]
    key, experts, ranks = exchange.key, exchange.num_experts, exchange.ranks
    if numbers != [Leaving(key, experts, ranks, rank) for rank in range(ranks)]:
        raise Refused("ranks exchange rows by numbers that are not those of this rank's assignments for each rank")
    return exchange


def _check_gradient(call: Call) -> None:
    if fake_of(call.node).requires_grad != fake_of(call["input"]).requires_grad:
        raise Refused("an exchange of rows through which no gradient flows")


def _home(call: Call, state: Interpretation, value: Value, exchange: Exchange) -> Value:
    """What became of rows, back to where they came from."""
    if _exchange_of(call, state, arriving="input_split_sizes", leaving="output_split_sizes") != exchange:
        raise Refused("rows are sent back by the numbers of others")
    _check_gradient(call)
    orders: dict[Atom, None] = {}
    content = _at_home(value.content, exchange, orders, state)
    if len(orders) != 1:
        raise Refused("rows that were sorted apart before their exchange meet after it")
    return Value((tuple(orders), *value.dims[1:]), content)


def _at_home(content: Content, exchange: Exchange, orders: dict[Atom, None], state: Interpretation) -> Content:
    """A content at a row that has arrived, as it is of the row's assignment where that is at home."""
    if isinstance(content, Sent) and content.exchange == exchange:
        orders[content.order] = None
        return content.content
    if isinstance(content, Constant):
        return content
    if isinstance(content, Apply):
        args = tuple(_at_home(argument, exchange, orders, state) for argument in content.args)
        return Apply(content.op, args, content.params)
    if isinstance(content, Contract):
        left, right = (_at_home(side, exchange, orders, state) for side in (content.left, content.right))
        return Contract(left, right, content.over, content.dtype)
    if isinstance(content, Element):
        return _of_all_ranks(content, exchange, state)
    raise Refused(f"{type(content).__name__.lower()} of this rank takes part in what becomes of all ranks' rows")


def _of_all_ranks(content: Element, exchange: Exchange, state: Interpretation) -> Element:
    """A tensor of one part for each expert of this rank, as that of all ranks'."""
    root, (first, *rest) = content.root, content.index or (None,)
    alone = exchange.here == 1 and isinstance(root, fx.Node) and state.shape(root)[:1] == (1,)
    if alone and not isinstance(first, Looked):
        first, rest = Looked(Own(exchange), 1), [*content.index]
    own = isinstance(root, fx.Node) and first == Looked(Own(exchange), exchange.here)
    if not own or not all(isinstance(part, (Atom, Affine)) for part in rest):
        raise Refused(
            f"{root}, of this rank alone, takes part in what becomes of all ranks' rows, and is not their experts'",
            root if isinstance(root, fx.Node) else None,
        )
    assert isinstance(root, fx.Node)
    spread = Spread(exchange.ranks, exchange.group)
    if state.spread.setdefault(root, spread) != spread:
        raise Refused(f"{root} has experts of two groups of ranks")
    return Element(root, (Looked(exchange.key, exchange.num_experts), *rest), content.written)


RULES: dict[str, Rule] = {
    "all_to_all_single": _all_to_all,
    "wait_tensor": _wait,
    "sum": _sum,
    "item": _item,
    "cast": _cast,
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
