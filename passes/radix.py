"""Sizes, and dimensions as groups of digits: the arithmetic of mixed radix that indices are written in.

Sizes are ints or sympy expressions, and are divided only where the quotient is known to be whole: nothing here guesses,
and nothing adds a guard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch

from moecompile.passes.terms import Atom, Group, Part, Size


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


def difference(first: Size, second: Size) -> int | None:
    """first - second, where that is a number."""
    if isinstance(first, int) and isinstance(second, int):
        return first - second
    import sympy

    result = sympy.expand(sympy.sympify(first) - sympy.sympify(second))
    return int(result) if result.is_number else None


def is_at_least(first: Size, second: Size) -> bool:
    """Whether first >= second for certain."""
    found = difference(first, second)
    return found is not None and found >= 0


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
