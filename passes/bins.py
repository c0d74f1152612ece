"""Whole numbers about the experts' rows: counts, bins rounded up to a block, where they begin, a row's slot in them.

    counts                                      (E,)     count
    (counts + b - 1) // b * b                   (E,)     b * blocks(b)          blocks(b) = ceil(count / b)
    rounded.cumsum(0)                           (E,)     b * block_ends(b)
    (ends - rounded)[ids] + arange(T*K) - ...   (T*K,)   such numbers of a row's own expert, and `row`, its number in
                                                         the sorted order

Each is a sum of whole multiples of a few symbols, so that equal numbers are equal terms in whatever way they were
added up. `PerExpert` is a tensor of one number an expert, `PerRow` one of a number for each assignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from moecompile.passes import radix, substitution
from moecompile.passes.interpret import Refused
from moecompile.passes.terms import (
    Atom,
    Constant,
    Content,
    Count,
    Element,
    Group,
    Index,
    Meaning,
    Offsets,
    Part,
    Size,
    Special,
    Value,
)
from moecompile.passes.unify import per_expert

# ("one",)  ("count", minimum)  ("offset",)  ("full", block)  ("blocks", block, minimum)  ("block_ends", block,
# minimum)  ("row", order)
Symbol: TypeAlias = "tuple[Any, ...]"

ONE: Symbol = ("one",)
COUNT: Symbol = ("count", 0)  # max(count, minimum)
OFFSET: Symbol = ("offset",)


@dataclass(frozen=True)
class Linear:
    """A sum of whole multiples of symbols, of the assignments that `key` gives to `num_experts` experts.

    Key is None for plain numbers.
    """

    key: Content | None
    num_experts: Size
    terms: frozenset[tuple[Symbol, int]]


@dataclass(frozen=True)
class PerExpert(Meaning):
    """One number an expert, in the experts' order."""

    linear: Linear

    def substituted(self, old: Atom, new: Part) -> Content:
        """The same where the dimension is only renamed; one expert's number, or in another order, is something else."""
        return self if isinstance(new, Atom) else Special("moved", (self, old, new))


@dataclass(frozen=True)
class PerRow(Meaning):
    """The number of the expert `at`, with the row's own number where `linear` has that."""

    linear: Linear
    at: Content

    def substituted(self, old: Atom, new: Part) -> Content:
        """The number at another index: no longer one of the row's own expert, if `at` is another then."""
        return replace(self, at=substitution.substitute(self.at, old, new))

    def inside(self) -> tuple[Content, ...]:
        """The expert."""
        return (self.at,)


@dataclass(frozen=True)
class Numbers:
    """A tensor of such numbers: one an expert, one an assignment (`at` is its expert), or plain."""

    dims: tuple[Group, ...]
    linear: Linear
    at: Content | None = None

    @property
    def kind(self) -> str:
        """What it speaks of.

        Plain, bins (experts), slots (assignments), row (its number in an order), run (0, 1, 2, ...).
        """
        symbols = {symbol[0] for symbol, _ in self.linear.terms}
        if self.linear.key is not None:
            return "bins" if self.at is None else "slots"
        return next((name for name in ("row", "place", "run") if name in symbols), "plain")


@dataclass(frozen=True)
class Slot:
    """A row's slot in bins of whole blocks: begin of its expert's bin + its number among the expert's rows."""

    order: Atom
    key: Content
    num_experts: Size
    block: int
    minimum: int

    @property
    def ends(self) -> Linear:
        """Where each expert's bin ends."""
        return Linear(self.key, self.num_experts, frozenset({(("block_ends", self.block, self.minimum), self.block)}))

    @property
    def linear(self) -> Linear:
        """begin + (row - first)."""
        return combined(before(self.ends), combined(plain(("row", self.order), 1), first_rows(self.ends), -1), 1)


def first_rows(ends: Linear) -> Linear:
    """The number of each expert's first row in the sorted order."""
    return before(replace(ends, terms=frozenset({(OFFSET, 1)})))


def counts_of(ends: Linear) -> Linear:
    """How many rows each expert has."""
    return replace(ends, terms=frozenset({(COUNT, 1)}))


def numbers_of(value: Value) -> Numbers | None:
    """The tensor as such numbers, or None if it is something else."""
    content, dims = value.content, value.dims
    if isinstance(content, (Count, Offsets)):
        symbol = COUNT if isinstance(content, Count) else OFFSET
        linear = Linear(content.key, content.num_experts, frozenset({(symbol, 1)}))
        return Numbers(dims, linear) if per_expert(value) else None
    if isinstance(content, PerExpert):
        linear = content.linear
        assert linear.key is not None
        return Numbers(dims, linear) if per_expert(Value(dims, Count(linear.key, linear.num_experts))) else None
    if isinstance(content, PerRow):
        return Numbers(dims, content.linear, content.at)
    if isinstance(content, Constant) and isinstance(content.value, int) and not isinstance(content.value, bool):
        return Numbers((), plain(ONE, content.value))
    if isinstance(content, Index) and len(content.atoms) == 1:
        (atom,) = content.atoms
        if is_whole_order(atom):
            return Numbers(dims, plain(("row", atom), 1))
        if atom.variable.kind == "free" and dims == (content.atoms,):
            return Numbers(dims, plain(("run",), 1))
    return None


def is_bins(content: Content) -> bool:
    """Whether the content is one number an expert."""
    return isinstance(content, (Count, Offsets, PerExpert))


def concerns_bins(content: Content) -> bool:
    """Whether the content is about bins that are rounded up, not only about counts."""
    return isinstance(content, (PerExpert, PerRow))


def is_slots(content: Content) -> bool:
    """Whether the content is one such number for each assignment."""
    return isinstance(content, PerRow)


def plain(symbol: Symbol, factor: int) -> Linear:
    """A number that belongs to no experts."""
    return Linear(None, 0, frozenset({(symbol, factor)} if factor else ()))


def is_whole_order(atom: Atom) -> bool:
    """Whether the atom runs through all rows of a sorted order."""
    variable = atom.variable
    return variable.kind == "order" and atom.divisor == 1 and atom.size == radix.group_size(variable.group)


def slot_of(content: Content) -> Slot | None:
    """The content as a row's slot in padded bins, or None if it is any other number."""
    if not isinstance(content, PerRow):
        return None
    linear, at = content.linear, content.at
    symbols = dict(linear.terms)
    order = next((symbol[1] for symbol in symbols if symbol[0] == "row"), None)
    blocks = next((symbol for symbol in symbols if symbol[0] == "blocks"), None)
    if order is None or blocks is None or not linear.key == at == order.variable.by:
        return None
    slot = Slot(order, linear.key, linear.num_experts, *blocks[1:])
    return slot if linear == slot.linear else None


def ends_of(value: Value) -> Linear | None:
    """One number an expert, as a linear form."""
    found = numbers_of(value)
    return found.linear if found is not None and found.kind == "bins" else None


def at_ids(value: Value, index: Value) -> Value:
    """One number an expert, looked up at ids: the number of each assignment's expert."""
    found = numbers_of(value)
    clamped = isinstance(index.content, Special) and index.content.kind == "expert" and index.content.about[1]
    if found is None or found.kind != "bins" or not (isinstance(index.content, Element) or clamped):
        raise Refused("the experts' counts, offsets or bins, looked up by something that is not the rows' expert ids")
    return Value(index.dims, content_of(found.linear, index.content))


def content_of(linear: Linear, at: Content | None) -> Content:
    """The content of one number an expert, or one an assignment."""
    assert linear.key is not None
    if at is not None:
        return PerRow(linear, at)
    if linear.terms == {(COUNT, 1)}:
        return Count(linear.key, linear.num_experts)
    if linear.terms == {(OFFSET, 1)}:
        return Offsets(linear.key, linear.num_experts)
    return PerExpert(linear)


# ---- arithmetic on one linear form


def _terms(symbols: Mapping[Symbol, int]) -> frozenset[tuple[Symbol, int]]:
    return frozenset((symbol, factor) for symbol, factor in symbols.items() if factor)


def combined(first: Linear, second: Linear, factor: int) -> Linear:
    """first + factor * second."""
    symbols = dict(first.terms)
    for symbol, multiple in second.terms:
        symbols[symbol] = symbols.get(symbol, 0) + factor * multiple
    owner = first if first.key is not None else second
    return Linear(owner.key, owner.num_experts, _terms(symbols))


def scaled(linear: Linear, factor: int) -> Linear:
    """factor * linear."""
    return Linear(linear.key, linear.num_experts, _terms({symbol: factor * by for symbol, by in linear.terms}))


def floored(linear: Linear, divisor: int) -> Linear:
    """floor(linear / divisor). Raises Refused where that is not linear in the symbols."""
    symbols = dict(linear.terms)
    constant = symbols.pop(ONE, 0)
    whole: dict[Symbol, int] = {}
    rest: list[tuple[Symbol, int]] = []
    for symbol, factor in symbols.items():
        if factor % divisor == 0:
            whole[symbol] = factor // divisor
        else:
            rest.append((symbol, factor))
    if rest:
        ((symbol, factor),) = rest if len(rest) == 1 else [(ONE, 0)]
        if symbol[0] != "count":
            raise Refused(f"the experts' counts or bins divided by {divisor}, which does not divide them")
        minimum = symbol[1]
        up: Symbol = ("blocks", divisor, minimum)
        part: Symbol
        if factor != -1 and factor % divisor == 1 and constant % divisor == divisor - 1:
            part, sign, constant = up, 1, constant - (divisor - 1)
        elif factor != -1 and factor % divisor == 1 and constant % divisor == 0 and minimum == 0:
            part, sign = ("full", divisor), 1
        elif (factor + 1) % divisor == 0 and constant % divisor == 0:
            part, sign = up, -1
        else:
            raise Refused(f"counts divided by {divisor}, rounded neither up nor down to whole blocks")
        whole[part] = whole.get(part, 0) + sign
        whole[symbol] = (factor - sign) // divisor
    whole[ONE] = constant // divisor
    return Linear(linear.key, linear.num_experts, _terms(whole))


def bounded_below(linear: Linear, minimum: int) -> Linear:
    """max(linear, minimum)."""
    symbols = dict(linear.terms)
    if minimum <= 0 and all(factor >= 0 for factor in symbols.values()):
        return linear
    if len(symbols) == 1:
        ((symbol, factor),) = symbols.items()
        if symbol[0] == "count" and factor == 1:
            return Linear(linear.key, linear.num_experts, frozenset({(("count", max(symbol[1], minimum)), 1)}))
        if symbol[0] == "blocks" and factor > 0 and minimum % factor == 0:
            raised = ("blocks", symbol[1], max(symbol[2], minimum // factor * symbol[1]))
            return Linear(linear.key, linear.num_experts, frozenset({(raised, factor)}))
    raise Refused("a lower bound of something that is neither the experts' counts nor their bins")


def summed(linear: Linear) -> Linear:
    """The inclusive running sum over the experts."""
    sums: dict[Symbol, int] = {}
    for symbol, factor in linear.terms:
        if symbol != COUNT and symbol[0] != "blocks":
            raise Refused("a running sum of something that is neither the experts' counts nor their bins")
        sums[OFFSET if symbol == COUNT else ("block_ends", *symbol[1:])] = factor
    return Linear(linear.key, linear.num_experts, _terms(sums))


def before(linear: Linear) -> Linear:
    """The running sum without the expert's own number: what the experts before it sum up to."""
    own: dict[Symbol, int] = {}
    for symbol, factor in linear.terms:
        if symbol != OFFSET and symbol[0] != "block_ends":
            raise Refused("the experts' numbers shifted by one, which are not running sums")
        own[COUNT if symbol == OFFSET else ("blocks", *symbol[1:])] = factor
    return combined(linear, Linear(linear.key, linear.num_experts, _terms(own)), -1)
