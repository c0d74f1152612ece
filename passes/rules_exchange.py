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

from dataclasses import replace

import torch
from torch import distributed, fx

from moecompile.passes import radix
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Interpretation, Passed, Refused, Rule, is_plain, walk
from moecompile.passes.rules_routing import known_range
from moecompile.passes.rules_segments import NUMBERS, in_order
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
    Index,
    Looked,
    Value,
)
from moecompile.passes.token_exchange import (
    COUNT,
    Arriving,
    Exchange,
    Leaving,
    Own,
    Segment,
    Sent,
    Tally,
    tally,
)
from moecompile.passes.unify import run_once_through
from moecompile.runtime.sharded import process_group


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
    if not isinstance(call["group_name"], str) or not distributed.is_initialized():
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
    if not in_order(value.dims, experts):
        raise Refused("the experts' counts, exchanged in another order than the experts'")
    parts = [radix.divide(shape[0], ranks)] * ranks
    if list(call["input_split_sizes"]) != parts or list(call["output_split_sizes"]) != parts:
        raise Refused("the experts' counts, exchanged in parts that are not each rank's own")
    if state.dtype(call["input"]) not in NUMBERS:
        raise Refused(f"the experts' counts, exchanged in {state.dtype(call['input'])}")
    known = known_range(key, state)
    if known is None or known > experts:
        raise Refused("ranks exchange rows of ids which may name no expert")
    exchange = Exchange(key, experts, ranks, call["group_name"])
    return reshaped(Value((exchange.by_rank,), tally(exchange, [(COUNT, 1)])), state.shape(call.node))


def _sum(call: Call, state: Interpretation) -> Value:
    """Of counts: the assignments of each rank, or of each expert."""
    value = state.value(call["input"])
    if len(value.dims) != 2 or not isinstance(value.content, (Count, Tally)):
        raise Passed
    dim = call["dim"][0] if isinstance(call["dim"], (list, tuple)) and len(call["dim"]) == 1 else call["dim"]
    if not isinstance(dim, int) or call["keepdim"] or state.dtype(call.node) not in NUMBERS:
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
    if not isinstance(key, Element) or not isinstance(experts, int) or not in_order(value.dims, experts) or dim != 1:
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
    if state.dtype(call.node) not in NUMBERS:
        raise Refused(f"numbers of rows in {state.dtype(call.node)}")
    return value


def _getitem(call: Call, state: Interpretation) -> Value:
    """One rank's number."""
    source = call["input"]
    if source in state.results or not isinstance(source, fx.Node) or not isinstance(fake_of(source), torch.Tensor):
        raise Passed
    value, index = state.value(source), call["index"]
    if not isinstance(value.content, (Leaving, Arriving)):
        raise Passed
    ranks = value.content.ranks if isinstance(value.content, Leaving) else value.content.exchange.ranks
    if type(index) is not int or not 0 <= index < ranks or len(value.dims) != 1 or value.content.rank is not None:
        raise Refused("numbers of rows, read otherwise than one rank's at a time")
    return Value((), replace(value.content, rank=index))


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
    "getitem": _getitem,
}
