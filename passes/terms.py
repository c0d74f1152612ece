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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import fx

if TYPE_CHECKING:
    import sympy

Size: TypeAlias = "int | sympy.Expr"


# Variables and atoms are made and compared by the thousand: named tuples do both in a third of a data class's time.
class Variable(NamedTuple):
    """An index variable. Rank says who gives way when two variables turn out to be the same index: the lower one."""

    # "free" (a repeated dimension), "between" (a name while several are renamed at once), "leaf", "ids" (a leaf of
    # integers), "slice", "bound" (contracted), "expert" (merged), "order" (a permutation of `group`), "rows" (a
    # subset), "places" and "padded" (slots of experts)
    kind: str
    key: Any  # what makes it this variable: a node, or a node and a number
    group: tuple[Atom, ...] = ()  # for "order" and "rows": the atoms it enumerates
    by: Content | None = None  # for "order": the key it is sorted by; for "rows": the condition that selects

    @property
    def rank(self) -> int:
        """0 for repeated dimensions up to 3 for enumerations, which never give way."""
        return {"free": 0, "between": 0, "slice": 1, "leaf": 1, "ids": 2}.get(self.kind, 3)


class Atom(NamedTuple):
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
