"""Dense mixtures: every expert sees every token, weighted by gates that are zero away from each token's chosen experts.

    sum over e of  F_e(x[t], G[t, e])      with  G[t, e] = 0  wherever e is not in ids[t]
  = sum over k of  F_ids[t,k](x[t], G[t, ids[t, k]])      if  F_e(x, 0) = 0  and the ids of a token are distinct

Where G vanishes its derivative must vanish as well, or the router's gradient would differ: `Interpretation.sparse`
holds only such leaves (a scatter into a constant, and functions of it that are flat there).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from moecompile.codegen import expression
from moecompile.passes import radix, substitution
from moecompile.passes.interpret import Combine, Interpretation, Refused, Sparse, walk
from moecompile.passes.merge import expert_atom, flattened, merge
from moecompile.passes.recognise import Block
from moecompile.passes.rules_routing import distinct
from moecompile.passes.terms import Apply, Atom, Constant, Content, Element, Fixed, Group, Looked, Total, Value


def as_assignments(total: Total, tokens: Group, state: Interpretation) -> tuple[Total, Group]:
    """The sum over all experts as a sum over each token's choices: (sum, the assignments' token digits)."""
    if len(total.over) != 1:
        raise Refused("a sum over something that is neither a token's choices nor all experts")
    expert = total.over[0]
    marker = Fixed(0, expert.size)
    elements = {
        inner: substitution.substitute(inner, expert, marker)
        for inner in walk(total.content)
        if isinstance(inner, Element) and state.sparse_leaf(inner) is not None
    }
    gates = {inner.root: at for inner, at in elements.items() if at != inner and isinstance(at, Element)}
    if not gates:
        raise Refused("a sum over all experts without gates that vanish away from each token's choices")
    if len(gates) > 1:
        raise Refused("a sum over all experts with several gates")
    ((root, gate),) = gates.items()
    assert isinstance(root, fx.Node)
    sparse = state.sparse[root]
    if sparse.outside != 0:
        raise Refused(f"the gates {root} are {sparse.outside} and not 0 away from each token's choices")
    if gate.index != (*tokens, marker):
        raise Refused(f"the gates {root} are not applied to their own tokens")
    return _by_choice(total, tokens, expert, sparse, state)


def _by_choice(total: Total, tokens: Group, expert: Atom, sparse: Sparse, state: Interpretation) -> tuple[Total, Group]:
    ids = sparse.ids
    if len(ids.dims) != 2 or not isinstance(ids.content, Element) or not distinct(ids, state):
        raise Refused("a token may name an expert twice, which a sum over all experts counts once")
    pairs = radix.align(tokens, ids.dims[0])
    if pairs is None:
        raise Refused("the gates' ids are of other tokens")
    content = substitution.rename(Value((), total.content), pairs).content
    content = substitution.substitute(content, expert, Looked(ids.content, expert.size))
    return Total(content, ids.dims[1], total.dtype), ids.dims[0]


def unrolled_sums(state: Interpretation) -> Iterator[Combine]:
    """Dense mixtures written expert by expert.

    Additions of one term an expert, each with its own column of the gates.
    """
    for node, value in state.made.items():
        content = value.content
        if (
            not isinstance(content, Apply)
            or content.op != "add"
            or any(_is_sum_of_more(user, content, state) for user in node.users)
        ):
            continue
        merged = _over_gates(node, value, state)
        if merged is not None:
            yield Combine(node, merged)
    yield from _sums_in_place(state)


def _sums_in_place(state: Interpretation) -> Iterator[Combine]:
    """The same added to zeros in place: one sum, at its last addition."""
    for base, zeros in state.made.items():
        value = state.values[base]
        if zeros.content != Constant(0) or not isinstance(value.content, Apply) or value.content.op != "add":
            continue
        additions = [
            writer
            for writer, targets in state.writers.items()
            if any(state.aliases.share(target, base) for target in targets)
        ]
        if not all(_adds_to(writer, base, state) for writer in additions):
            continue
        merged = _over_gates(additions[-1], value, state)
        if merged is not None:
            yield Combine(additions[-1], merged, base, True, tuple(additions[:-1]))


def _adds_to(writer: fx.Node, base: fx.Node, state: Interpretation) -> bool:
    """Whether a write is an addition to the whole of the base."""
    call = state.calls.get(writer)
    targets = state.writers[writer]
    return call is not None and call.name == "add" and all(state.aliases.same_elements(at, base) for at in targets)


def _over_gates(node: fx.Node, value: Value, state: Interpretation) -> Value | None:
    """A chain of additions as one sum over the experts; None if it is something else."""
    found = _by_gate(flattened(value.content), state)
    if found is None:
        return None
    try:
        merged = merge([found[number] for number in sorted(found)], node)
    except Refused as reason:
        state.refusals[node] = str(reason)
        return None
    return Value(value.dims, Total(merged, (expert_atom(len(found)),), state.dtype(node)))


def _is_sum_of_more(user: fx.Node, content: Content, state: Interpretation) -> bool:
    value = state.made.get(user)
    return (
        value is not None
        and isinstance(value.content, Apply)
        and value.content.op == "add"
        and content in value.content.args
    )


def _by_gate(additions: list[Content], state: Interpretation) -> dict[int, Content] | None:
    """Each term under the number of the one gates' column it uses.

    None unless the numbers are all experts, once each.
    """
    found: dict[int, Content] = {}
    for term in additions:
        columns = {
            part
            for inner in walk(term)
            if isinstance(inner, Element) and state.sparse_leaf(inner) is not None
            for part in inner.index
            if isinstance(part, Fixed)
        }
        if len(columns) != 1:
            return None
        (column,) = columns
        if column.index in found or column.extent != len(additions):
            return None
        found[column.index] = term
    return found or None


def uses_gates(block: Block) -> bool:
    """Whether the routing weight is looked up in a table of (tokens, experts)."""
    return block.weight is not None and any(isinstance(part, Looked) for part in block.weight.index)


def check_vanishing(block: Block) -> None:
    """Raises Refused unless an expert whose gate is 0 adds exactly 0 to the sum."""
    if not vanishes(block, "weight"):
        raise Refused("experts that are not chosen add something to the sum although their gate is 0")


def vanishes(block: Block, leaf: str) -> bool:
    """Whether a block adds exactly 0 to the sum where `leaf`, the routing weight or the token's row, is 0."""
    zeros = {leaf}
    if _is_zero(block.input, zeros) and all(product.bias is None for product in block.inner):
        zeros |= {"gate", "up", "hidden"}
    assert block.out is not None
    if _is_zero(block.activation, zeros) and block.out.bias is None:
        zeros |= {"out"}
    return _is_zero(block.output, zeros)


# functions that are 0 at 0, with a finite derivative there
_ZERO_AT_ZERO = frozenset(
    "neg abs sign square silu tanh relu relu6 leaky_relu elu celu selu gelu erf mish hardswish cast log1p".split()
)


def _is_zero(text: str, zeros: set[str]) -> bool:
    return _vanishes(expression.parse(text), zeros)


def _vanishes(parsed: expression.Expression, zeros: set[str]) -> bool:
    if isinstance(parsed, expression.Leaf):
        return parsed.name in zeros
    if isinstance(parsed, expression.Constant):
        return parsed.value == 0
    values = [_vanishes(argument, zeros) for argument in parsed.args]
    if parsed.op == "mul":
        return any(values)
    if parsed.op in ("add", "sub", "minimum", "maximum"):
        return all(values)
    if parsed.op == "div":
        return values[0] and isinstance(parsed.args[1], expression.Constant)
    if parsed.op == "clamp":
        low, high = (*parsed.params, None, None)[:2]
        return (
            values[0]
            and not (isinstance(low, (int, float)) and low > 0)
            and not (isinstance(high, (int, float)) and high < 0)
        )
    return parsed.op in _ZERO_AT_ZERO and values[0]
