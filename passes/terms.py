"""What a tensor of the graph means: its elements as terms over named index variables.

Detection interprets the graph. A tensor's meaning is a `Value`: one group of index atoms for each dimension, and a
`Content`, the term that gives the element at those indices. An atom is a digit of a variable,
`(variable // divisor) % size`, so that reshapes are exact regroupings of digits:

    tensor               shape      dims                          content
    x                    (B, S, H)  ((x/SH%B), (x/H%S), (x%H))    x[x/SH%B, x/H%S, x%H]
    x.view(-1, H)        (T, H)     ((x/H%T), (x%H))              the same
    ids.view(-1)         (T*K,)     ((j))                         ids[j]
    ids.sort().indices   (T*K,)     ((order))                     the index j
    x[order // K]        (T*K, H)   ((order), (x%H))              x[j/K, x%H]
    W[ids]               (T*K,N,H)  ((j), (n), (h))               W[ids[j], n, h]

Here j names an assignment, token j/K and choice j%K, and `order` enumerates every j once, sorted by ids[j]. Contents
speak of assignments and dims of where they lie, so gathers, permutations, sorts and un-permutations leave the content
alone; only the dims change. Two tensors computed in different ways mean the same if their values are equal. Whatever
has no rule is a leaf and means itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

if TYPE_CHECKING:
    import sympy

Size: TypeAlias = "int | sympy.Expr"


@dataclass(frozen=True)
class Variable:
    """An index variable. Rank says who gives way when two variables turn out to be the same index: the lower one."""

    # "free" (a repeated dimension), "leaf", "ids" (a leaf of integers), "slice", "bound" (contracted), "expert"
    # (merged), "order" (a permutation of `group`), "rows" (a subset), "places" and "padded" (slots of experts)
    kind: str
    key: Any  # what makes it this variable: a node, or a node and a number
    group: tuple[Atom, ...] = ()  # for "order" and "rows": the atoms it enumerates
    by: Content | None = None  # for "order": the key it is sorted by; for "rows": the condition that selects

    @property
    def rank(self) -> int:
        """0 for repeated dimensions up to 3 for enumerations, which never give way."""
        return {"free": 0, "slice": 1, "leaf": 1, "ids": 2}.get(self.kind, 3)


@dataclass(frozen=True)
class Atom:
    """One digit of a variable: (variable // divisor) % size."""

    variable: Variable
    divisor: Size
    size: Size


@dataclass(frozen=True)
class Affine:
    """start + step * atom: a slice of a dimension of `extent` elements."""

    atom: Atom
    start: int
    step: int
    extent: Size


@dataclass(frozen=True)
class Fixed:
    """One chosen index of a dimension of `extent` elements."""

    index: int
    extent: Size


@dataclass(frozen=True)
class Looked:
    """An index that is itself looked up: the value of an integer content, in a dimension of `extent` elements."""

    content: Content
    extent: Size


Part: TypeAlias = "Atom | Affine | Fixed | Looked"


@dataclass(frozen=True)
class Stacked:
    """One tensor an expert, taken as one tensor with the experts first."""

    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Element:
    """An element of the leaf `root`, at a flat index in mixed radix, most significant digit first.

    As it is after `written`, if that is a node.
    """

    root: fx.Node | Stacked
    index: tuple[Part, ...]
    written: fx.Node | None = None


@dataclass(frozen=True)
class Index:
    """An integer: the flat index of `atoms` in mixed radix."""

    atoms: tuple[Atom, ...]


@dataclass(frozen=True)
class Constant:
    """A number."""

    value: float | int | bool


@dataclass(frozen=True)
class Apply:
    """An elementwise operation; `params` are its further arguments (codegen/expression.py has the names)."""

    op: str
    args: tuple[Content, ...]
    params: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Contract:
    """sum over `over` of left * right: a matrix product, in the dtype of its result."""

    left: Content
    right: Content
    over: Atom
    dtype: torch.dtype


@dataclass(frozen=True)
class Equals:
    """1 where an integer content equals the index `atom` (or a fixed index), else 0: a one-hot mask."""

    content: Content
    atom: Part


@dataclass(frozen=True)
class Count:
    """How many of all elements of `key` equal the index: one number for each expert."""

    key: Content
    num_experts: Size


@dataclass(frozen=True)
class Offsets:
    """Inclusive running sum of Count: where each expert's rows end."""

    key: Content
    num_experts: Size


@dataclass(frozen=True)
class Total:
    """sum over the assignments' atoms `over` of `content`; `dtype` is that of the sum."""

    content: Content
    over: tuple[Atom, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Special:
    """A meaning that only the rules of one form understand: its kind, and what it is about."""

    kind: str
    about: tuple[Any, ...]


class Meaning:
    """Base of the contents that one form's rules define for themselves.

    Frozen dataclasses that say how indices in them are replaced.
    """

    def substituted(self, old: Atom, new: Part) -> Content:
        """The content with every occurrence of the digit `old` replaced by `new`."""
        raise NotImplementedError(f"{type(self).__name__} must say how an index in it is replaced")

    def inside(self) -> tuple[Content, ...]:
        """The contents it is made of."""
        return ()


Content: TypeAlias = (
    "Element | Index | Constant | Apply | Contract | Equals | Count | Offsets | Total | Special | Meaning"
)
Group: TypeAlias = "tuple[Atom, ...]"


@dataclass(frozen=True)
class Value:
    """The meaning of a tensor: a group of atoms for each dimension, and the element there."""

    dims: tuple[Group, ...]
    content: Content


def uncast(content: Content) -> tuple[Content, str | None]:
    """An element without its conversion to another dtype, and that dtype; anything else as it is."""
    if isinstance(content, Apply) and content.op == "cast" and isinstance(content.args[0], Element):
        return content.args[0], content.params[0]
    return content, None


# ---- sizes


def size_of(dimension: Any) -> Size:
    """A dimension as int or sympy expression; SymInts are never compared, which would add guards."""
    if isinstance(dimension, int):
        return dimension
    if isinstance(dimension, torch.SymInt):
        expression = dimension.node.expr
        return int(expression) if expression.is_number else expression
    return dimension


@cache
def divide(dividend: Size, divisor: Size) -> Size | None:
    """The exact quotient, or None if it is not known to be whole."""
    if isinstance(dividend, int) and isinstance(divisor, int):
        return dividend // divisor if divisor and dividend % divisor == 0 else None
    if divisor == 0:
        return None
    import sympy

    quotient = sympy.sympify(dividend) / sympy.sympify(divisor)
    if sympy.fraction(quotient)[1] != 1:
        quotient = sympy.cancel(quotient)
        if sympy.fraction(quotient)[1] != 1:
            return None
    return int(quotient) if quotient.is_number else quotient


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes."""
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def extent_of(part: Part) -> Size:
    """How many values the dimension indexed by this part has."""
    return part.size if isinstance(part, Atom) else part.extent


def group_size(group: Sequence[Atom]) -> Size:
    """How many elements a dimension of these atoms has."""
    return product(atom.size for atom in group)


def overlap(first: Atom, second: Atom) -> bool:
    """Whether two atoms hold a common digit of one variable."""
    if first.variable != second.variable:
        return False
    above = divide(second.divisor, first.divisor * first.size)
    below = divide(first.divisor, second.divisor * second.size)
    return (above is None or above == 0) and (below is None or below == 0)


# ---- regrouping


def merge(atoms: Iterable[Atom]) -> Group:
    """Join neighbouring digits of one variable: (v/4%2, v%4) is v%8. The canonical form of a group."""
    merged: list[Atom] = []
    for atom in atoms:
        if atom.size == 1:
            continue
        last = merged[-1] if merged else None
        if last is not None and last.variable == atom.variable and last.divisor == atom.divisor * atom.size:
            merged[-1] = Atom(atom.variable, atom.divisor, last.size * atom.size)
        else:
            merged.append(atom)
    return tuple(merged)


def split(atom: Atom, low: Size) -> tuple[Atom, Atom] | None:
    """The atom as (high digit, low digit of size `low`), or None if the sizes do not divide."""
    high = divide(atom.size, low)
    if high is None:
        return None
    return Atom(atom.variable, atom.divisor * low, high), Atom(atom.variable, atom.divisor, low)


def regroup(atoms: Sequence[Atom], sizes: Sequence[Size]) -> tuple[Group, ...] | None:
    """Distribute digits, in order, over dimensions of the given sizes; None if a dimension cuts a digit unevenly."""
    remaining = [atom for atom in reversed(atoms) if atom.size != 1]  # least significant first
    groups: list[Group] = []
    for size in reversed(sizes):
        group: list[Atom] = []
        need = size
        while need != 1:
            if not remaining:
                return None
            atom = remaining.pop(0)
            rest = divide(need, atom.size)
            if rest is None:
                parts = split(atom, need)
                if parts is None:
                    return None
                remaining.insert(0, parts[0])
                atom, rest = parts[1], 1
            group.insert(0, atom)
            need = rest
        groups.insert(0, merge(group))
    return None if remaining else tuple(groups)


def digits(atom: Atom, sizes: Sequence[Size]) -> tuple[Group, ...] | None:
    """`regroup` for one whole variable, whose size is the product of the sizes."""
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return regroup([atom], sizes)
    groups: list[Group] = []
    divisor = atom.divisor
    for size in reversed(sizes):
        groups.append((Atom(atom.variable, divisor, size),) if size != 1 else ())
        divisor = divisor * size
    return tuple(reversed(groups))


def align(first: Sequence[Atom], second: Sequence[Atom]) -> list[tuple[Atom, Atom]] | None:
    """Two groups of the same extent, cut at common boundaries.

    Pairs of digits of equal size. None if that is not possible.
    """
    left, right = list(reversed(first)), list(reversed(second))
    pairs: list[tuple[Atom, Atom]] = []
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if a.size != b.size:
            if (cut := split(a, b.size)) is not None:
                left.insert(0, cut[0])
                a = cut[1]
            elif (cut := split(b, a.size)) is not None:
                right.insert(0, cut[0])
                b = cut[1]
            else:
                return None
        pairs.insert(0, (a, b))
    return None if left or right else pairs


# ---- substitution


def _replace_atom(part: Atom, old: Atom, new: Part) -> list[Part]:
    """The part with the digit `old` of its variable replaced; the part itself if it does not hold that digit."""
    if part.variable != old.variable:
        return [part]
    if part == old:
        return [new]
    below = divide(old.divisor, part.divisor)
    above = divide(part.divisor * part.size, old.divisor * old.size)
    if below is None or above is None:
        return [part]
    pieces: list[Part] = [
        Atom(part.variable, old.divisor * old.size, above),
        new,
        Atom(part.variable, part.divisor, below),
    ]
    return [piece for piece in pieces if extent_of(piece) != 1 or piece is new]


def substitute(content: Content, old: Atom, new: Part) -> Content:
    """The content with every occurrence of the digit `old` replaced by `new`."""
    if isinstance(content, Element):
        return Element(content.root, substitute_index(content.index, old, new), content.written)
    if isinstance(content, Index):
        if any(overlap(old, digit) for atom in content.atoms for digit in atom.variable.group):
            return Special("index", (content, old, new))  # the place of `old` in an order; `new` has another
        parts = [piece for atom in content.atoms for piece in _replace_atom(atom, old, new)]
        if all(isinstance(part, Atom) for part in parts):
            return Index(merge(part for part in parts if isinstance(part, Atom)))
        return Special("index", tuple(parts))
    if isinstance(content, Apply):
        return replace(content, args=tuple(substitute(argument, old, new) for argument in content.args))
    if isinstance(content, Contract):
        return replace(content, left=substitute(content.left, old, new), right=substitute(content.right, old, new))
    if isinstance(content, Equals):
        atom: Part = new if content.atom == old else content.atom
        return Equals(substitute(content.content, old, new), atom)
    if isinstance(content, Total):
        return replace(content, content=substitute(content.content, old, new))
    if isinstance(content, Meaning):
        return content.substituted(old, new)
    if isinstance(content, Special) and content.kind == "spread":
        mask, number = content.about
        return Special("spread", (substitute(mask, old, new), substitute(number, old, new)))
    return content


def substitute_index(index: Sequence[Part], old: Atom, new: Part) -> tuple[Part, ...]:
    """A flat index in mixed radix with every occurrence of the digit `old` replaced by `new`."""
    parts: list[Part] = []
    for part in index:
        if isinstance(part, Atom):
            parts += _replace_atom(part, old, new)
        elif isinstance(part, Affine):
            parts.append(compose(part, new) if part.atom == old else part)
        elif isinstance(part, Looked):
            parts.append(Looked(substitute(part.content, old, new), part.extent))
        else:
            parts.append(part)
    return _merge_parts(parts)


def compose(outer: Affine, inner: Part) -> Part:
    """start + step * inner."""
    if isinstance(inner, Atom):
        return replace(outer, atom=inner)
    if isinstance(inner, Fixed):
        return Fixed(outer.start + outer.step * inner.index, outer.extent)
    if isinstance(inner, Affine):
        return Affine(inner.atom, outer.start + outer.step * inner.start, outer.step * inner.step, outer.extent)
    return Looked(Special("affine", (outer.start, outer.step, inner)), outer.extent)


def _merge_parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, Atom) and isinstance(last, Atom):
            joined = merge((last, part))
            merged[-1:] = joined
        elif not (isinstance(part, Atom) and part.size == 1):
            merged.append(part)
    return tuple(merged)


def rename(value: Value, pairs: Sequence[tuple[Atom, Part]]) -> Value:
    """The value with digits renamed all at once (a swap stays a swap), in its dims and its content."""
    pairs = [(old, new) for old, new in pairs if old != new]
    through = [Atom(Variable("free", ("rename", number)), 1, old.size) for number, (old, _) in enumerate(pairs)]
    steps: list[tuple[Atom, Part]] = [(old, between) for (old, _), between in zip(pairs, through, strict=True)]
    steps += [(between, new) for (_, new), between in zip(pairs, through, strict=True)]
    dims, content = value.dims, value.content
    for old, new in steps:
        content = substitute(content, old, new)
        dims = tuple(
            merge(piece for atom in group for piece in _replace_atom(atom, old, new) if isinstance(piece, Atom))
            for group in dims
        )
    return Value(dims, content)
