"""Replace indices in terms: one digit by another part, or several at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moecompile.passes import radix
from moecompile.passes.interpret import Refused
from moecompile.passes.terms import (
    Affine,
    Apply,
    Atom,
    Content,
    Contract,
    Count,
    Element,
    Equals,
    Fixed,
    Index,
    Looked,
    Meaning,
    Offsets,
    Part,
    Special,
    Total,
    Value,
    Variable,
)


def _replace_atom(part: Atom, old: Atom, new: Part) -> list[Part]:
    """The part with the digit `old` of its variable replaced; the part itself if it does not hold that digit."""
    if part.variable != old.variable:
        return [_other(part, old, new) if _is_another(part, old, new) else part]
    if part == old:
        return [new]
    below = radix.divide(old.divisor, part.divisor)
    above = radix.divide(part.divisor * part.size, old.divisor * old.size)
    if below is None or above is None:
        return [_digit_of(part, old, new) if radix.overlap(part, old) else part]
    pieces: list[Part] = [
        Atom(part.variable, old.divisor * old.size, above),
        new,
        Atom(part.variable, part.divisor, below),
    ]
    return [piece for piece in pieces if radix.extent_of(piece) != 1 or piece is new]


def _is_another(atom: Atom, old: Atom, new: Part) -> bool:
    """Whether an index that is not `old` itself becomes another when that is replaced.

    Raises Refused if `old` is given the name of a digit that the content has already: two would be one.
    """
    if old.variable.kind == "between" and isinstance(new, Atom) and radix.overlap(atom, new):
        raise Refused("one index in the place of two")
    return radix.overlap(atom, old) or depends(atom, old)


def depends(part: Atom, digit: Atom) -> bool:
    """Whether a digit is a place among assignments, those in an order for example, that the other digit is one of."""
    group = part.variable.group
    return bool(group) and any(radix.overlap(own, digit) or depends(own, digit) for own in group)


def _digit_of(part: Atom, old: Atom, new: Part) -> Part:
    """What `part`, a digit of the digit `old`, is when that is replaced."""
    low = radix.divide(part.divisor, old.divisor)
    if low is not None and radix.divide(old.size, low * part.size) is not None:
        if isinstance(new, Atom):
            return Atom(new.variable, new.divisor * low, part.size)
        if isinstance(new, Fixed) and isinstance(low, int) and isinstance(part.size, int):
            return Fixed(new.index // low % part.size, part.size)
    return _other(part, old, new)


def _other(part: Part, old: Atom, new: Part) -> Part:
    """An index that is known to be another than it was, and no more."""
    return Looked(Special("digit", (part, old, new)), radix.extent_of(part))


def substitute(content: Content, old: Atom, new: Part) -> Content:
    """The content with every occurrence of the digit `old` replaced by `new`."""
    if isinstance(content, Element):
        return Element(content.root, substitute_index(content.index, old, new), content.written)
    if isinstance(content, Index):
        if any(depends(atom, old) for atom in content.atoms):
            return Special("index", (content, old, new))  # the place of `old` in an order; `new` has another
        parts = [piece for atom in content.atoms for piece in _replace_atom(atom, old, new)]
        if all(isinstance(part, Atom) for part in parts):
            return Index(radix.merge(part for part in parts if isinstance(part, Atom)))
        return Special("index", tuple(parts))
    if isinstance(content, Apply):
        return replace(content, args=tuple(substitute(argument, old, new) for argument in content.args))
    if isinstance(content, Contract):
        return replace(content, left=substitute(content.left, old, new), right=substitute(content.right, old, new))
    if isinstance(content, Equals):
        return Equals(substitute(content.content, old, new), substitute_part(content.atom, old, new))
    if isinstance(content, Total):
        return replace(content, content=substitute(content.content, old, new))
    if isinstance(content, Meaning):
        return content.substituted(old, new)
    if isinstance(content, Special) and content.kind == "spread":
        mask, number = content.about
        return Special("spread", (substitute(mask, old, new), substitute(number, old, new)))
    if isinstance(content, Special) and mentions(content.about, old):
        return Special("moved", (content, old, new))  # only its own rules know what it is at another index
    if isinstance(content, (Count, Offsets)) and not isinstance(new, Atom):
        return Special("moved", (content, old, new))  # one expert's, or in another order: no longer one an expert
    return content


def mentions(item: Any, digit: Atom) -> bool:
    """Whether what a special meaning is about depends on a digit."""
    if isinstance(item, Atom):
        return radix.overlap(item, digit)
    if isinstance(item, (tuple, frozenset)):
        return any(mentions(part, digit) for part in item)
    if dataclasses.is_dataclass(item) and not isinstance(item, (type, Variable)):
        return any(mentions(getattr(item, entry.name), digit) for entry in dataclasses.fields(item))
    return False


def substitute_index(index: Sequence[Part], old: Atom, new: Part) -> tuple[Part, ...]:
    """A flat index in mixed radix with every occurrence of the digit `old` replaced by `new`."""
    parts: list[Part] = []
    for part in index:
        if isinstance(part, Atom):
            parts += _replace_atom(part, old, new)
        elif isinstance(part, Affine):
            if part.atom == old:
                parts.append(compose(part, new))
            else:
                parts.append(_other(part, old, new) if _is_another(part.atom, old, new) else part)
        elif isinstance(part, Looked):
            parts.append(Looked(substitute(part.content, old, new), part.extent))
        else:
            parts.append(part)
    return _merge_parts(parts)


def substitute_part(part: Part, old: Atom, new: Part) -> Part:
    """One index with the digit `old` replaced; an index that is known to be another, where it is more than a digit."""
    if part == old:
        return new
    found = substitute_index((part,), old, new)
    if not found:  # an index of one value, which a flat index leaves out
        return part
    return found[0] if len(found) == 1 else _other(part, old, new)


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
            joined = radix.merge((last, part))
            merged[-1:] = joined
        elif not (isinstance(part, Atom) and part.size == 1):
            merged.append(part)
    return tuple(merged)


def rename(value: Value, pairs: Sequence[tuple[Atom, Part]]) -> Value:
    """The value with digits renamed all at once (a swap stays a swap), in its dims and its content."""
    pairs = [(old, new) for old, new in pairs if old != new]
    through = [Atom(Variable("between", number), 1, old.size) for number, (old, _) in enumerate(pairs)]
    steps: list[tuple[Atom, Part]] = [(old, between) for (old, _), between in zip(pairs, through, strict=True)]
    steps += [(between, new) for (_, new), between in zip(pairs, through, strict=True)]
    dims, content = value.dims, value.content
    for old, new in steps:
        content = substitute(content, old, new)
        dims = tuple(
            radix.merge(piece for atom in group for piece in _replace_atom(atom, old, new) if isinstance(piece, Atom))
            for group in dims
        )
    return Value(dims, content)
