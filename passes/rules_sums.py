"""Rules for sums over assignments: where expert outputs come together into tokens, and counts."""

from __future__ import annotations

from typing import Any

from moecompile.passes import radix
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Combine, Interpretation, Refused, Rule, Sparse, is_plain, is_routed
from moecompile.passes.rules_index import rows_index
from moecompile.passes.rules_loop import add_term, rows_of_one
from moecompile.passes.rules_routing import distinct, scattered_counts, summed_counts
from moecompile.passes.terms import Constant, Fixed, Group, Index, Special, Total, Value
from moecompile.passes.unify import enumerates, run_once_through, unify, without


def _sum(call: Call, state: Interpretation) -> Value | None:
    value = state.value(call["input"])
    dims = call["dim"]
    if dims is None:
        dims = list(range(len(value.dims)))
    dims = (
        [dim % len(value.dims) for dim in (dims if isinstance(dims, (tuple, list)) else [dims])] if value.dims else []
    )
    counts = summed_counts(call, value, dims, state)
    if counts is not None:
        return counts
    picked = _picked(call, value, dims, state)
    if picked is not None:
        return picked
    _gates(call, state, value, dims)
    if is_plain(value) or not is_routed(value):
        return None
    if call["keepdim"]:
        raise Refused("a sum that keeps its dimension")
    over: Group = tuple(atom for dim in dims for atom in value.dims[dim])
    if len(dims) != 1 or any(atom.variable.rank >= 3 for atom in over):
        raise Refused("a sum over rows in an order of their own")
    rest = tuple(group for dim, group in enumerate(value.dims) if dim not in dims)
    result = Value(rest, Total(value.content, over, state.dtype(call.node)))
    state.combine(Combine(call.node, result))
    return None


def _picked(call: Call, value: Value, dims: list[int], state: Interpretation) -> Value | None:
    """(weights * (ids == e)).sum(choices): for the tokens that chose expert e, the weight of that choice."""
    content = value.content
    if (
        not isinstance(content, Special)
        or content.kind != "spread"
        or not isinstance(content.about[0].atom, Fixed)
        or len(dims) != 1
        or call["keepdim"]
    ):
        return None
    ids = content.about[0].content
    rest = tuple(group for dim, group in enumerate(value.dims) if dim not in dims)
    choices = value.dims[dims[0]]
    if not run_once_through(value.dims, ids) or not distinct(Value((*rest, choices), ids), state):
        raise Refused("weights summed over something else than a token's choices, of which one names the expert")
    return Value(rest, Special("picked", content.about))


def _gates(call: Call, state: Interpretation, value: Value, dims: list[int]) -> None:
    """(one_hot(ids) * weights).sum(choices): a sparse leaf of gates, zero away from each token's experts."""
    content = value.content
    if not isinstance(content, Special) or content.kind != "spread" or len(dims) != 1 or call["keepdim"]:
        return
    mask, _ = content.about
    rest = [group for dim, group in enumerate(value.dims) if dim not in dims]
    if len(rest) == 2 and rest[1] == (mask.atom,):
        ids = Value((rest[0], value.dims[dims[0]]), mask.content)
        if distinct(ids, state):
            state.sparse[call.node] = Sparse(ids, 0)


def _index_add(call: Call, state: Interpretation) -> Value | None:
    counts = scattered_counts(call, state)
    if counts is not None:
        return counts
    if call["alpha"] != 1 or call["dim"] not in (0, -2) or len(state.shape(call["input"])) != 2:
        raise Refused("index_add along another dimension, or scaled")
    return _added_rows(call, state, state.value(call["index"]), call["source"])


def _scatter_add(call: Call, state: Interpretation) -> Value | None:
    counts = scattered_counts(call, state)
    if counts is not None:
        return counts
    index = state.value(call["index"])
    if len(index.dims) != 2 or call["dim"] not in (0, -2):
        raise Refused("scatter_add along another dimension")
    if [*map(radix.group_size, index.dims)] != [*map(radix.group_size, state.value(call["src"]).dims)]:
        raise Refused("scatter_add of a part of its source")
    return _added_rows(call, state, rows_index(index, 0), call["src"])


def _deterministic_scatter_add(call: Call, state: Interpretation) -> Value | tuple[Value | None, ...] | None:
    """torchtitan's: scatter_add along the first dimension, in an order that is the same in every run."""
    arguments = {"input": call["out"], "dim": 0, "index": call["index"], "src": call["src"]}
    return state.rules["scatter_add"](Call("scatter_add", arguments, False, call.node), state)


def _index_put(call: Call, state: Interpretation) -> Value | None:
    """index_put with accumulate=True adds rows; without it, it is a write through a permutation."""
    if call["accumulate"] is True and len(call["indices"]) == 1:
        return _added_rows(call, state, state.value(call["indices"][0]), call["values"])
    from moecompile.passes.rules_index import RULES as INDEX_RULES

    return INDEX_RULES["index_put"](call, state)  # type: ignore[return-value]


def _added_rows(call: Call, state: Interpretation, index: Value, source: Any) -> Value | None:
    """base[token of row] += row, for every assignment once: a sum over each token's choices, added to the base."""
    rows = state.value(source)
    if not is_routed(rows):
        return None
    if rows_of_one(rows) is not None or rows_of_one(index) is not None:
        return add_term(call, state, call["input"], index, rows)
    if not isinstance(index.content, Index) or len(index.dims) != 1 or len(rows.dims) != 2:
        raise Refused("rows added at an index that is not their token's number")
    dims, contents = unify([Value((index.dims[0], ()), index.content), rows])
    if dims[0] != rows.dims[0] and dims[0] != index.dims[0]:
        raise Refused("rows added in another order than their index")
    covered = enumerates(dims[0])
    token = contents[0]
    if covered is None or not isinstance(token, Index):
        raise Refused("rows of only some assignments are added")
    over = without(covered, token.atoms)
    if over is None or state.shape(call["input"])[0] != radix.group_size(token.atoms):
        raise Refused("rows added at an index that is not their token's number")
    if state.dtype(source) != state.dtype(call.node):
        raise Refused("rows added in another dtype")
    result = Value((token.atoms, dims[1]), Total(contents[1], over, state.dtype(call.node)))
    base = state.value(call["input"])
    fresh = base.content == Constant(0)
    state.combine(Combine(call.node, result, call["input"], fresh))
    return None


RULES: dict[str, Rule] = {
    "sum": _sum,
    "index_add": _index_add,
    "scatter_add": _scatter_add,
    "deterministic_scatter_add": _deterministic_scatter_add,
    "index_put": _index_put,
}
