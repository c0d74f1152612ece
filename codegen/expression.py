"""Elementwise expressions as text: what a model computes between its expert GEMMs, exactly as it wrote it.

An expression is a frozen tree of `Leaf`, `Constant` and `Apply`. `to_text` and `parse` are exact inverses, so that
an FX graph can carry an expression in a string attribute:

    mul(silu(gate), up)                       SwiGLU
    mul(add(up, 1), mul(clamp(gate, None, 7.0), sigmoid(mul(clamp(gate, None, 7.0), 1.702))))

Grammar: a leaf is a name; a constant is a Python literal (`1`, `-0.5`, `1e-05`, `inf`, `-inf`, `nan`, `True`); an
application lists its argument expressions and then its parameters, which are literals, `None` or bare words
(`gelu(x, tanh)`, `cast(gate, float32)`). Trailing parameters may be left out and then have torch's defaults.

Nothing is simplified or reordered, and type promotion is torch's: a constant never widens a tensor of its own kind.
This module knows no torch; `moecompile.runtime.elementwise` gives the names their meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

Scalar = float | int | bool
Parameter = Scalar | str | None


class Signature(NamedTuple):
    """How many expressions an operation takes, and its parameters with torch's defaults."""

    arguments: int
    parameters: tuple[str, ...] = ()
    defaults: tuple[Parameter, ...] = ()


BINARY = Signature(2)
UNARY = Signature(1)

# A parameter without a default (the dtype of `cast`) has to be written.
OPERATIONS: dict[str, Signature] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "pow", "minimum", "maximum"), BINARY),
    **dict.fromkeys(("neg", "exp", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "abs", "sign", "square"), UNARY),
    **dict.fromkeys(("sigmoid", "logsigmoid", "silu", "tanh", "relu", "relu6", "selu", "erf", "mish"), UNARY),
    **dict.fromkeys(("hardswish", "hardsigmoid"), UNARY),
    "leaky_relu": Signature(1, ("negative_slope",), (0.01,)),
    "elu": Signature(1, ("alpha",), (1.0,)),
    "celu": Signature(1, ("alpha",), (1.0,)),
    "gelu": Signature(1, ("approximate",), ("none",)),
    "softplus": Signature(1, ("beta", "threshold"), (1.0, 20.0)),
    "clamp": Signature(1, ("min", "max"), (None, None)),
    "cast": Signature(1, ("dtype",)),
}

_LITERALS: dict[str, Parameter] = {"None": None, "True": True, "False": False, "inf": math.inf, "nan": math.nan}
_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|[-+]?(?:inf\b|\d+\.?\d*(?:[eE][-+]?\d+)?)|[(),])")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def _literal(value: Parameter) -> str:
    return value if isinstance(value, str) else repr(value)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor that comes from outside: `x`, `gate`, `up`, `hidden`, `out` or `weight`."""

    name: str

    def __post_init__(self) -> None:
        if not _NAME.match(self.name) or self.name in _LITERALS:
            raise ValueError(
                f"a leaf's name must be an identifier other than {', '.join(_LITERALS)}; got {self.name!r}"
            )


@dataclass(frozen=True, slots=True)
class Constant:
    """A Python scalar. Constants are equal when they print the same: 1, 1.0 and True differ, nan equals itself."""

    value: Scalar = field(compare=False)
    text: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.value, bool | int | float):
            raise TypeError(f"a constant must be a bool, int or float; got {type(self.value).__name__} {self.value!r}")
        object.__setattr__(self, "text", _literal(self.value))


@dataclass(frozen=True, slots=True)
class Apply:
    """An operation of `OPERATIONS` on expressions; `params` are its scalar, word or None parameters."""

    op: str
    args: tuple[Expression, ...]
    params: tuple[Parameter, ...] = field(default=(), compare=False)
    text: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        signature = OPERATIONS.get(self.op)
        if signature is None:
            raise ValueError(f"unknown operation {self.op!r}; known are {', '.join(sorted(OPERATIONS))}")
        if len(self.args) != signature.arguments:
            raise ValueError(f"{self.op} takes {signature.arguments} expression(s), got {len(self.args)}")
        if all(isinstance(arg, Constant) for arg in self.args):
            raise ValueError(f"{self.op} needs at least one argument that is no constant")
        required = len(signature.parameters) - len(signature.defaults)
        if not required <= len(self.params) <= len(signature.parameters):
            named = ", ".join(signature.parameters) or "none"
            raise ValueError(f"{self.op}'s parameters are ({named}), got {len(self.params)} of them")
        for param in self.params:
            if isinstance(param, str) and (not _NAME.match(param) or param in _LITERALS):
                raise ValueError(f"{self.op}: a word parameter must be an identifier, got {param!r}")
        object.__setattr__(self, "text", tuple(_literal(param) for param in self.params))


Expression = Leaf | Constant | Apply


def parameters(apply: Apply) -> tuple[Parameter, ...]:
    """All parameters of an application, those left out filled with torch's defaults."""
    signature = OPERATIONS[apply.op]
    missing = len(signature.parameters) - len(apply.params)
    return apply.params + signature.defaults[len(signature.defaults) - missing :]


def to_text(expression: Expression) -> str:
    """The expression's text, the exact inverse of `parse`."""
    match expression:
        case Leaf():
            return expression.name
        case Constant():
            return expression.text
        case Apply():
            return f"{expression.op}({', '.join([*map(to_text, expression.args), *expression.text])})"
    raise TypeError(f"expected an Expression, got {type(expression).__name__}")


def leaves(expression: Expression) -> frozenset[str]:
    """Names of the leaves that the expression reads."""
    return frozenset(_leaf_names(expression))


def _leaf_names(expression: Expression) -> Iterator[str]:
    if isinstance(expression, Leaf):
        yield expression.name
    elif isinstance(expression, Apply):
        for arg in expression.args:
            yield from _leaf_names(arg)


def parse(text: str) -> Expression:
    """The expression that `text` spells, the exact inverse of `to_text`.

    Raises ValueError with the text and the position of what was not understood.
    """
    return _Parser(text).whole()


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        self.index = 0
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error("expected a name, a number, '(', ')' or ','", end - len(text[position:end].lstrip()))
            self.tokens.append((match.group(1), match.start(1)))
            position = match.end()

    def error(self, what: str, position: int) -> ValueError:
        return ValueError(f"cannot parse expression {self.text!r} at position {position}: {what}")

    def peek(self) -> str:
        return self.tokens[self.index][0] if self.index < len(self.tokens) else ""

    def position(self) -> int:
        return self.tokens[self.index][1] if self.index < len(self.tokens) else len(self.text)

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise self.error(f"expected {expected or 'an expression'!r}, got {token or 'the end'!r}", self.position())
        self.index += 1
        return token

    def whole(self) -> Expression:
        expression = self.expression()
        if self.index < len(self.tokens):
            raise self.error(f"expected the end, got {self.peek()!r}", self.position())
        return expression

    def expression(self) -> Expression:
        position = self.position()
        token = self.take()
        if self.peek() == "(" and _NAME.match(token):
            return self.application(token, position)
        value = self.literal(token, position)
        if isinstance(value, str):
            return Leaf(value)
        if value is None:
            raise self.error("None is a parameter, not an expression", position)
        return Constant(value)

    def application(self, op: str, position: int) -> Expression:
        if op not in OPERATIONS:
            raise self.error(f"unknown operation {op!r}; known are {', '.join(sorted(OPERATIONS))}", position)
        self.take("(")
        args: list[Expression] = []
        params: list[Parameter] = []
        while self.peek() != ")":
            if args:
                self.take(",")
            if len(args) < OPERATIONS[op].arguments:
                args.append(self.expression())
            else:
                position_of_literal = self.position()
                params.append(self.literal(self.take(), position_of_literal))
        self.take(")")
        try:
            return Apply(op, tuple(args), tuple(params))
        except ValueError as error:
            raise self.error(str(error), position) from None

    def literal(self, token: str, position: int) -> Parameter:
        if token in _LITERALS:
            return _LITERALS[token]
        if _NAME.match(token):
            return token
        try:
            return int(token) if re.fullmatch(r"[-+]?\d+", token) else float(token)
        except ValueError:
            raise self.error(f"expected a literal, got {token!r}", position) from None
