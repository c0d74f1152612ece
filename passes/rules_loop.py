"""Rules for loops over experts: rows selected by a mask, results added back until the last expert completes the sum.

place, token = where(ids == e)        two indices over the rows that chose e: the choice and token digits of
                                      the assignments with ids[j] == e
out[token] += f_e(x[token]) * w       a partial sum {e: term}, complete once every expert that the ids can name
                                      has added exactly one term
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from moecompile.passes import radix, substitution
from moecompile.passes.aliases import fake_of
from moecompile.passes.calls import Call
from moecompile.passes.interpret import Combine, Interpretation, Refused, Rule
from moecompile.passes.merge import expert_atom, merge
from moecompile.passes.rules_routing import distinct, joined_ids
from moecompile.passes.terms import (
    Apply,
    Atom,
    Constant,
    Content,
    Element,
    Equals,
    Fixed,
    Group,
    Index,
    Looked,
    Special,
    Total,
    Value,
    Variable,
)
from moecompile.passes.unify import look_up, unify, without


@dataclass(frozen=True)
class Partial:
    """A sum that some experts have added their terms to."""

    base: fx.Node  # the tensor the first term was added to
    fresh: bool  # which held zeros
    terms: tuple[tuple[int, Content], ...]
    nodes: tuple[fx.Node, ...]  # the additions so far
    num_experts: Any
    features: Group = ()  # the terms' common feature dimension


def chosen_rows(call: Call, state: Interpretation) -> tuple[Value | None, ...] | None:
    """where(mask) and nonzero(mask, as_tuple=True): the assignments a mask selects, one index a dimension."""
    value = state.value(call["input"] if call.name == "nonzero" else call["condition"])
    rows = _rows(call, state, value)
    return tuple(Value(((rows,),), Index(group)) for group in value.dims)


def _rows(call: Call, state: Interpretation, value: Value) -> Atom:
    content = value.content
    digits = radix.merge(sorted((atom for group in value.dims for atom in group), key=_significance, reverse=True))
    if isinstance(content, Special) and content.kind == "any":
        content, digits = (
            content.about[0],
            radix.merge(sorted((*digits, *content.about[1]), key=_significance, reverse=True)),
        )
    if not isinstance(content, Equals) or not isinstance(content.atom, Fixed):
        raise Refused("rows selected by a mask that is not one expert's")
    if not isinstance(content.content, Element) or content.content.index != digits:
        raise Refused("rows selected from only some of the assignments")
    first = next(part for part in _tensors(fake_of(call.node)))
    return Atom(Variable("rows", call.node, digits, content), 1, radix.size_of(first.shape[0]))


def _significance(atom: Atom) -> int:
    return atom.divisor if isinstance(atom.divisor, int) else 1 << 62


def _tensors(fake: Any) -> list[Any]:
    return [fake] if not isinstance(fake, (tuple, list)) else list(fake)


def _where(call: Call, state: Interpretation) -> tuple[Value | None, ...] | None:
    return chosen_rows(call, state) if call["input"] is None and call["other"] is None else None


def _nonzero(call: Call, state: Interpretation) -> Value | tuple[Value | None, ...] | None:
    if call["as_tuple"]:
        return chosen_rows(call, state)
    value = state.value(call["input"])
    if len(value.dims) != 1:
        raise Refused("nonzero of several dimensions in one tensor")
    return Value(((_rows(call, state, value),), ()), Index(value.dims[0]))


def _any(call: Call, state: Interpretation) -> Value | None:
    """(ids == e).any(choices): the tokens that chose the expert."""
    value = state.value(call["input"])
    if not isinstance(value.content, Equals) or not isinstance(call["dim"], int) or call["keepdim"]:
        return None
    dim = call["dim"] % len(value.dims)
    rest = tuple(group for number, group in enumerate(value.dims) if number != dim)
    if not distinct(Value((*rest, value.dims[dim]), value.content.content), state):
        raise Refused("tokens that chose an expert are counted once where they may choose it twice")
    return Value(rest, Special("any", (value.content, value.dims[dim])))


# ---- adding terms


def rows_of_one(value: Value) -> Atom | None:
    """The `rows` atom that a tensor's first dimension enumerates, if it does."""
    group = value.dims[0] if value.dims else ()
    return group[0] if len(group) == 1 and group[0].variable.kind == "rows" else None


def add_term(call: Call, state: Interpretation, target: fx.Node, index: Value, rows: Value) -> Value | None:
    """target[token of row] += row, for one expert's rows; a leaf once the last expert has added."""
    dims, contents = unify([Value((index.dims[0], ()), index.content), rows])
    atom, token = rows_of_one(Value(dims, rows.content)), contents[0]
    if atom is None or not isinstance(token, Index):
        raise Refused("rows added at an index that is not their token's number")
    key = atom.variable.by
    assert isinstance(key, Equals) and isinstance(key.atom, Fixed)
    choices = without(atom.variable.group, token.atoms)
    if choices is None or state.shape(target)[0] != radix.group_size(token.atoms):
        raise Refused("rows added at an index that is not their token's number")
    before = state.value(target)
    partial = _partial(before.content, target, key, choices)
    if any(expert == key.atom.index for expert, _ in partial.terms):
        raise Refused(f"expert {key.atom.index} adds to the sum twice")
    features = partial.features if partial.terms else dims[1]
    if partial.terms and before.dims != (token.atoms, features):
        raise Refused("a sum that is rearranged while experts are still adding to it")
    term = substitution.rename(Value((), contents[1]), _same_names((dims[1],), (features,))).content
    after = replace(
        partial, terms=(*partial.terms, (key.atom.index, term)), nodes=(*partial.nodes, call.node), features=features
    )
    value = Value((token.atoms, features), Special("partial", (after, key.content, choices)))
    return None if _completes(call, state, after, key, value, choices) else value


def _partial(before: Content, target: fx.Node, key: Equals, choices: Group) -> Partial:
    if isinstance(before, Special) and before.kind == "partial":
        partial, ids, over = before.about
        if ids != key.content:
            raise Refused("experts that are chosen by different ids add to one sum")
        if over != choices:
            raise Refused("experts that sum over different choices add to one sum")
        return partial
    extent = key.atom.extent if isinstance(key.atom, Fixed) else 0
    return Partial(target, before == Constant(0), (), (), extent)


def _completes(call: Call, state: Interpretation, partial: Partial, key: Equals, value: Value, choices: Group) -> bool:
    """Whether all experts that the ids can name have added: then it notes a combine."""
    numbers = [expert for expert, _ in partial.terms]
    count = partial.num_experts
    if sorted(numbers) != list(range(count)):
        return False
    try:
        merged = merge([content for _, content in sorted(partial.terms, key=lambda term: term[0])], call.node)
    except Refused as reason:
        state.refusals[call.node] = str(reason)
        return False
    content = substitution.substitute(merged, expert_atom(count), Looked(key.content, count))
    total = Total(content, choices, state.dtype(call.node if fake_of(call.node) is not None else call["input"]))
    state.combine(Combine(call.node, Value(value.dims, total), partial.base, partial.fresh, partial.nodes))
    return True


def assigned_rows(call: Call, state: Interpretation, target: fx.Node, index: Value, source: Value) -> Value | None:
    """target[token] = source, where source is target[token] + term, or where each token is written once into zeros."""
    atom = rows_of_one(index)
    assert atom is not None
    key = atom.variable.by
    assert isinstance(key, Equals)
    ids = _ids_of(atom, index)
    if not distinct(ids, state):
        raise Refused("rows assigned to tokens of which some may occur twice")
    before = state.value(target)
    read_back = look_up(before, [0], [index], 0).content
    content = source.content
    if isinstance(content, Apply) and content.op == "add" and read_back in content.args:
        rest = [argument for argument in content.args if argument != read_back]
        if len(rest) == 1:
            return add_term(call, state, target, index, Value(source.dims, rest[0]))
    fresh = before.content == Constant(0) or (
        isinstance(before.content, Special) and before.content.kind == "partial" and before.content.about[0].fresh
    )
    if fresh and without(atom.variable.group, index.content.atoms if isinstance(index.content, Index) else ()) == ():
        return add_term(call, state, target, index, source)
    raise Refused("rows that replace what other experts wrote")


def _ids_of(atom: Atom, index: Value) -> Value:
    """The expert ids as (token, choice), for the question whether a token's are distinct."""
    key = atom.variable.by
    assert isinstance(key, Equals) and isinstance(index.content, Index)
    choices = without(atom.variable.group, index.content.atoms)
    return Value((index.content.atoms, choices or ()), key.content)


# ---- sorted rows cut into one piece an expert: split(counts.tolist()), a product each, cat


def _item(call: Call, state: Interpretation) -> None:
    """counts[e].item(): remembered as expert e's number of rows."""
    value = state.value(call["input"])
    if isinstance(value.content, Special) and value.content.kind == "count":
        state.numbers[call.node] = value.content


def split_by_counts(call: Call, state: Interpretation) -> tuple[Value | None, ...] | None:
    """Rows sorted by expert, split by the experts' counts.

    One piece an expert. None if the sizes are not such counts.
    """
    sizes = call["split_size_or_sections"]
    counts = (
        [state.numbers.get(size) if isinstance(size, fx.Node) else None for size in sizes]
        if isinstance(sizes, (list, tuple))
        else []
    )
    if not counts or any(count is None for count in counts):
        return None
    value = state.value(call["tensor"])
    order = value.dims[0][0] if len(value.dims[0]) == 1 else None
    if call["dim"] % len(value.dims) != 0 or order is None or order.variable.kind != "order":
        raise Refused("rows split by the experts' counts that are not sorted by expert")
    key = order.variable.by
    expected = [Special("count", (key, number, len(counts))) for number in range(len(counts))]
    if counts != expected:
        raise Refused("rows split by other counts than those of their own experts in order")
    pieces: list[Value | None] = []
    for number, fake in enumerate(fake_of(call.node)):
        assert key is not None
        rows = Atom(
            Variable("rows", (order, number), order.variable.group, Equals(key, Fixed(number, len(counts)))),
            1,
            radix.size_of(fake.shape[0]),
        )
        pieces.append(Value(((rows,), *value.dims[1:]), value.content))
    return tuple(pieces)


def _cat(call: Call, state: Interpretation) -> Value | None:
    """The pieces of all experts, in order, put together again; or ids of several choices."""
    if not isinstance(call["tensors"], (list, tuple)) or call["dim"] not in (0, -2):
        return joined_ids(call, state)
    values = [state.value(tensor) for tensor in call["tensors"]]
    atoms = [rows_of_one(value) for value in values]
    if any(atom is None or not isinstance(atom.variable.key, tuple) for atom in atoms) or not atoms:
        return joined_ids(call, state)
    keys = [atom.variable.key for atom in atoms if atom is not None]
    order = keys[0][0]
    by = next(atom.variable.by for atom in atoms if atom is not None)
    if (
        not isinstance(by, Equals)
        or not isinstance(by.atom, Fixed)
        or keys != [(order, number) for number in range(by.atom.extent)]
    ):
        raise Refused("pieces of rows put together in another order, or not all of them")
    aligned = [value.dims[1:] for value in values]
    named = [
        substitution.rename(value, _same_names(dims, aligned[0])) for value, dims in zip(values, aligned, strict=True)
    ]
    merged = merge([value.content for value in named], call.node)
    content = substitution.substitute(merged, expert_atom(len(values)), Looked(by.content, len(values)))
    return Value(((order,), *aligned[0]), content)


def _same_names(dims: tuple[Group, ...], target: tuple[Group, ...]) -> list[tuple[Atom, Atom]]:
    pairs: list[tuple[Atom, Atom]] = []
    for group, other in zip(dims, target, strict=True):
        aligned = radix.align(group, other)
        if aligned is None:
            raise Refused("pieces with other features")
        pairs += aligned
    return pairs


RULES: dict[str, Rule] = {
    "where": _where,
    "nonzero": _nonzero,
    "any": _any,
    "item": _item,
    "cat": _cat,
}
