"""C++ for the expressions that stand before, between and after the products: their value, and their gradient.

    print_struct("Activation", "mul(silu(gate), up)", ("gate", "up"))

        struct Activation {
            static __device__ __forceinline__ float value(float gate, float up) {
                float v0 = elementwise::silu(gate);
                float v1 = elementwise::mul(v0, up);
                return v1;
            }
            static __device__ __forceinline__ void backward(float grad, ..., float& d_gate, float& d_up) {
                ...
            }
        };

Everything is computed in float32 and nothing is simplified; equal subexpressions are one value, as where the model
named it. A cast rounds: to bfloat16, say, and is float32 again. Each operation is a function of
`kernels/elementwise.cuh`, its gradient the function of that name with `_backward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moecompile.codegen.expression import Apply, Constant, Expression, Leaf, leaves, parameters, parse

WIDE = frozenset({"float32", "float64"})
"""Dtypes that a cast to rounds nothing of a float32."""
ROUNDED = {"bfloat16": "bf16", "float16": "f16"}

Value = str
"""The name of a C++ variable, or a literal."""


@dataclass
class _Program:
    """Straight-line code: each operation with the names of its arguments and of its value."""

    names: dict[Expression, Value] = field(default_factory=dict)
    steps: list[tuple[Value, Apply, tuple[Value, ...]]] = field(default_factory=list)

    def add(self, tree: Expression) -> Value:
        """The name of an expression's value; what it needs is computed before it, once."""
        if isinstance(tree, Constant):
            return literal(float(tree.value))
        if tree not in self.names:
            if isinstance(tree, Leaf):
                self.names[tree] = tree.name
            else:
                arguments = tuple(self.add(argument) for argument in tree.args)
                self.names[tree] = f"v{len(self.steps)}"
                self.steps.append((self.names[tree], tree, arguments))
        return self.names[tree]


def print_struct(name: str, expression: str, reads: Sequence[str]) -> str:
    """A C++ struct of that name with the functions `value` and `backward` of an expression.

    Args:
        name: of the struct.
        expression: text, as the operators carry it.
        reads: names of the leaves, in the order of the functions' parameters; those that the expression does not read
            have the gradient 0.

    Raises:
        ValueError: the expression reads something else, or casts to a dtype that kernels do not round to.
    """
    tree = parse(expression)
    unknown = leaves(tree) - set(reads)
    if unknown:
        raise ValueError(f"{expression!r} reads {', '.join(sorted(unknown))}; there is only {', '.join(reads)}")
    program = _Program()
    result = program.add(tree)
    given = ", ".join(f"float {leaf}" for leaf in reads)
    taken = ", ".join(f"float& d_{leaf}" for leaf in reads)
    values = [f"float {target} = {_value(step, arguments)};" for target, step, arguments in program.steps]
    function = "static __device__ __forceinline__"
    lines = [
        f"struct {name} {{",
        f"    {function} float value({given}) {{",
        *(f"        {line}" for line in (*values, f"return {result};")),
        "    }",
        f"    {function} void backward(float grad, {given}, {taken}) {{",
        *(f"        {line}" for line in (*values, *_gradients(program, result, reads))),
        "    }",
        "};",
    ]
    return "\n".join(lines) + "\n"


def literal(value: float) -> Value:
    """A float literal that reads back as exactly this number, rounded to float32 once."""
    if math.isnan(value):
        return "__int_as_float(0x7fc00000)"
    if math.isinf(value):
        return "__int_as_float(0x7f800000)" if value > 0 else "__int_as_float(0xff800000)"
    return f"float({value!r})"


def _value(step: Apply, arguments: Sequence[Value]) -> str:
    if step.op == "cast":
        dtype = str(parameters(step)[0])
        if dtype in WIDE:
            return arguments[0]
        if dtype not in ROUNDED:
            raise ValueError(f"kernels round to {', '.join((*ROUNDED, *sorted(WIDE)))}; got a cast to {dtype}")
        return f"elementwise::round_{ROUNDED[dtype]}({arguments[0]})"
    return f"elementwise::{_function(step)}({', '.join((*arguments, *_numbers(step)))})"


def _function(step: Apply) -> str:
    if step.op == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}[str(parameters(step)[0])]
    return step.op


def _numbers(step: Apply) -> list[Value]:
    """The parameters as literals; a bound of clamp that is not there is an infinity."""
    if step.op == "gelu":
        return []
    if step.op == "clamp":
        low, high = parameters(step)
        return [literal(-math.inf if low is None else float(low)), literal(math.inf if high is None else float(high))]
    return [literal(float(number)) for number in parameters(step) if number is not None]


def _gradients(program: _Program, result: Value, reads: Sequence[str]) -> Iterator[str]:
    """Reverse mode: the gradient of every value is there before that of its arguments."""
    known: dict[Value, str] = {result: "grad"}
    variables = set(program.names.values())
    made: dict[Value, int] = {}
    for target, step, arguments in reversed(program.steps):
        upstream = known.pop(target, None)
        if upstream is None:
            continue
        for place, argument in enumerate(arguments):
            if argument not in variables:  # a literal
                continue
            number = made[argument] = made.get(argument, -1) + 1
            name = f"g_{argument}_{number}"
            yield f"float {name} = {_gradient(step, place, upstream, arguments, target)};"
            if argument in known:
                total = f"g_{argument}_{number}_sum"
                yield f"float {total} = {known[argument]} + {name};"
                name = total
            known[argument] = name
    for leaf in reads:
        yield f"d_{leaf} = {known.get(leaf, '0')};"


def _gradient(step: Apply, place: int, upstream: str, arguments: Sequence[Value], result: Value) -> str:
    if step.op == "cast":
        return upstream
    suffix = f"_backward_{place}" if len(arguments) == 2 else "_backward"
    return f"elementwise::{_function(step)}{suffix}({', '.join((upstream, *arguments, result, *_numbers(step)))})"
