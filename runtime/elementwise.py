"""Evaluates elementwise expressions in torch and differentiates them as torch's own autograd does.

`OPERATORS` is one table: name -> (forward, backward). Forward is the torch function that a model would have called, so
that values equal the model's bit for bit, promotion included. Backward repeats the formula of torch's
derivatives.yaml (through aten's own `*_backward` operators where they exist), so that gradients agree at ties, at
signed zeros, infinities and NaN as well.

Expressions are compiled once to straight-line code in which equal subexpressions are one value, as in the model that
wrote them, where `clamp(gate)` used twice is one tensor.
"""

from __future__ import annotations

import ctypes
import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moecompile.codegen.expression import (
    OPERATIONS,
    Apply,
    Constant,
    Expression,
    Leaf,
    Scalar,
    leaves,
    parameters,
    parse,
    to_text,
)

Value = Tensor | Scalar
Args = Sequence[Any]
Needs = Sequence[bool]
Gradients = tuple[Tensor | None, ...]
Forward = Callable[..., Tensor]
Backward = Callable[[Tensor, Sequence[Any], Tensor, Sequence[Any], Sequence[bool]], Gradients]
"""(gradient, arguments, result, parameters, needs) -> the gradient of each argument that needs one, else None."""

aten = torch.ops.aten


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype called `name`, e.g. `bfloat16`; raises ValueError for any other word."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"cast needs the name of a torch dtype, e.g. 'bfloat16'; got {name!r}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """What `dtype_named` calls it."""
    return str(dtype).removeprefix("torch.")


def _like(value: Value, other: Value) -> Tensor:
    """`value` as a tensor; a scalar becomes one of no dimensions in the other's dtype."""
    if isinstance(value, Tensor):
        return value
    assert isinstance(other, Tensor)
    return other.new_full((), value)


def _log(base: Scalar) -> float:
    if base > 0:
        return math.log(base)
    return -math.inf if base == 0 else math.nan


def _add(grad: Tensor, args: Args, result: Tensor, params: Args, needs: Needs) -> Gradients:
    return grad, grad


def _sub(grad: Tensor, args: Args, result: Tensor, params: Args, needs: Needs) -> Gradients:
    return grad, -grad if needs[1] else None


def _mul(grad: Tensor, args: Args, result: Tensor, params: Args, needs: Needs) -> Gradients:
    return grad * args[1] if needs[0] else None, grad * args[0] if needs[1] else None


def _div(grad: Tensor, args: Args, result: Tensor, params: Args, needs: Needs) -> Gradients:
    left, right = args
    of_left = grad / right if needs[0] else None
    if not needs[1]:
        return of_left, None
    if isinstance(left, Tensor):
        return of_left, -grad * ((left / right) / right)
    inverse = right.reciprocal()  # Python's `1 / x` is x.reciprocal() * 1
    return None, -(grad * left) * (inverse * inverse)


def _pow(grad: Tensor, args: Args, result: Tensor, params: Args, needs: Needs) -> Gradients:
    base, exponent = args
    of_base = of_exponent = None
    if needs[0] and isinstance(exponent, Tensor):
        of_base = torch.where(exponent == 0.0, 0.0, grad * (exponent * base.pow(exponent - 1)))
    elif needs[0]:
        of_base = torch.zeros_like(base) if exponent == 0 else grad * (exponent * base.pow(exponent - 1))
    if needs[1] and isinstance(base, Tensor):
        of_exponent = grad * torch.where((base == 0) & (exponent >= 0), 0.0, result * base.log())
    elif needs[1]:
        of_exponent = grad * (result * _log(base))
        if base == 0:
            of_exponent = torch.where(exponent >= 0, 0.0, of_exponent)
    return of_base, of_exponent


def _extremum(chosen: Callable[[Tensor, Tensor], Tensor]) -> Backward:
    """Half the gradient to each where the two are equal, all of it to the one that `chosen` does not exclude."""

    def backward(grad: Tensor, args: Args, result: Tensor, params: Args, needs: Needs) -> Gradients:
        left, right = _like(args[0], args[1]), _like(args[1], args[0])
        shared = torch.where(left == right, grad / 2, grad)
        return shared.masked_fill(chosen(right, left), 0), shared.masked_fill(chosen(left, right), 0)

    return backward


def _clamp(grad: Tensor, args: Args, result: Tensor, params: Args, needs: Needs) -> Gradients:
    """The bounds themselves pass the gradient; NaN does not."""
    low, high = params
    inside = args[0] >= low if low is not None else args[0] <= high
    if low is not None and high is not None:
        inside = inside.logical_and_(args[0] <= high)
    return (torch.where(inside, grad, 0.0),)


def _logsigmoid(grad: Tensor, args: Args, result: Tensor, params: Args, needs: Needs) -> Gradients:
    _, buffer = aten.log_sigmoid_forward.default(args[0])
    return (aten.log_sigmoid_backward.default(grad, args[0], buffer),)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def _unary(forward: Forward, backward: Callable[[Tensor, Any, Tensor], Tensor]) -> tuple[Forward, Backward]:
    """A row for an operation of one tensor without parameters: backward(gradient, argument, result)."""
    return forward, lambda grad, args, result, params, needs: (backward(grad, args[0], result),)


OPERATORS: dict[str, tuple[Forward, Backward]] = {
    # Python's operators take a scalar on either side exactly as the model's own source did.
    "add": (operator.add, _add),
    "sub": (operator.sub, _sub),
    "mul": (operator.mul, _mul),
    "div": (operator.truediv, _div),
    "pow": (operator.pow, _pow),
    "minimum": (lambda a, b: torch.minimum(_like(a, b), _like(b, a)), _extremum(torch.lt)),
    "maximum": (lambda a, b: torch.maximum(_like(a, b), _like(b, a)), _extremum(torch.gt)),
    "neg": _unary(torch.neg, lambda g, x, y: -g),
    "exp": _unary(torch.exp, lambda g, x, y: g * y),
    "log": _unary(torch.log, lambda g, x, y: g / x),
    "log1p": _unary(torch.log1p, lambda g, x, y: g / (x + 1)),
    "sqrt": _unary(torch.sqrt, lambda g, x, y: g / (2 * y)),
    "rsqrt": _unary(torch.rsqrt, lambda g, x, y: -0.5 * g * y.pow(3)),
    "reciprocal": _unary(torch.reciprocal, lambda g, x, y: -g * (y * y)),
    "abs": _unary(torch.abs, lambda g, x, y: g * x.sgn()),
    "sign": _unary(torch.sign, lambda g, x, y: torch.zeros_like(g)),
    "square": _unary(torch.square, lambda g, x, y: g * (2 * x)),
    "sigmoid": _unary(torch.sigmoid, lambda g, x, y: aten.sigmoid_backward.default(g, y)),
    "logsigmoid": (torch.nn.functional.logsigmoid, _logsigmoid),
    "silu": _unary(torch.nn.functional.silu, lambda g, x, y: aten.silu_backward.default(g, x)),
    "tanh": _unary(torch.tanh, lambda g, x, y: aten.tanh_backward.default(g, y)),
    "relu": _unary(torch.relu, lambda g, x, y: aten.threshold_backward.default(g, y, 0)),
    "relu6": _unary(torch.nn.functional.relu6, lambda g, x, y: aten.hardtanh_backward.default(g, x, 0, 6)),
    "leaky_relu": (
        torch.nn.functional.leaky_relu,
        lambda g, args, y, params, needs: (aten.leaky_relu_backward.default(g, args[0], params[0], False),),
    ),
    "elu": (
        torch.nn.functional.elu,
        lambda g, args, y, params, needs: (aten.elu_backward.default(g, params[0], 1, 1, False, args[0]),),
    ),
    # derivatives.yaml divides by alpha.toFloat(), float32 whatever the tensor
    "celu": (
        torch.celu,
        lambda g, args, y, params, needs: (
            aten.elu_backward.default(g, params[0], 1, 1.0 / ctypes.c_float(params[0]).value, False, args[0]),
        ),
    ),
    "selu": _unary(torch.selu, lambda g, x, y: aten.elu_backward.default(g, SELU_ALPHA, SELU_SCALE, 1, False, x)),
    "gelu": (
        lambda x, approximate: torch.nn.functional.gelu(x, approximate=approximate),
        lambda g, args, y, params, needs: (aten.gelu_backward.default(g, args[0], approximate=params[0]),),
    ),
    "erf": _unary(torch.erf, lambda g, x, y: 2.0 / math.sqrt(math.pi) * torch.exp(-x.pow(2)) * g),
    "softplus": (
        torch.nn.functional.softplus,
        lambda g, args, y, params, needs: (aten.softplus_backward.default(g, args[0], *params),),
    ),
    "mish": _unary(torch.nn.functional.mish, lambda g, x, y: aten.mish_backward.default(g, x)),
    "hardswish": _unary(torch.nn.functional.hardswish, lambda g, x, y: aten.hardswish_backward.default(g, x)),
    "hardsigmoid": _unary(torch.nn.functional.hardsigmoid, lambda g, x, y: aten.hardsigmoid_backward.default(g, x)),
    "clamp": (torch.clamp, _clamp),
    "cast": (lambda x, dtype: x.to(dtype), lambda g, args, y, params, needs: (g,)),
}
assert OPERATORS.keys() == OPERATIONS.keys(), (
    "the operator table and the expression table must name the same operations"
)


WRITING: dict[str, Callable[..., Tensor]] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}
"""Operations that can write their result where it is wanted."""


@dataclass(frozen=True)
class Step:
    """One operation of a program; its arguments are indices of earlier values, or constants."""

    op: str
    args: tuple[int | Constant, ...]
    params: tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """Straight-line code: values 0..len(leaves)-1 are the leaves, then one value a step, the result last."""

    leaves: tuple[str, ...]
    steps: tuple[Step, ...]

    def run(self, env: Mapping[str, Tensor], into: Tensor | None = None) -> list[Tensor]:
        """All values, leaves first; the result is written to `into`, of its shape and dtype, if that is given."""
        values = [env[name] for name in self.leaves]
        for step in self.steps:
            arguments = _arguments(step, values)
            if into is not None and step is self.steps[-1] and step.op in WRITING and isinstance(arguments[0], Tensor):
                values.append(WRITING[step.op](*arguments, out=into))
            else:
                forward, _ = OPERATORS[step.op]
                values.append(forward(*arguments, *step.params))
        if into is not None and values[-1] is not into:
            values[-1] = into.copy_(values[-1])
        return values


def _arguments(step: Step, values: Sequence[Tensor]) -> list[Any]:
    return [arg.value if isinstance(arg, Constant) else values[arg] for arg in step.args]


@functools.lru_cache(maxsize=1024)
def compiled(expression: Expression | str) -> Program:
    """The expression as a program, kept for the next call; `expression` may be its text."""
    tree = parse(expression) if isinstance(expression, str) else expression
    index: dict[Expression, int] = {Leaf(name): position for position, name in enumerate(sorted(leaves(tree)))}
    inputs = len(index)
    if not inputs:
        raise ValueError(f"an expression must read at least one leaf, got {to_text(tree)!r}")
    steps: list[Step] = []

    def visit(node: Expression) -> int | Constant:
        if isinstance(node, Constant):
            return node
        if node not in index:
            assert isinstance(node, Apply)
            args = tuple(visit(arg) for arg in node.args)
            params: tuple[Any, ...] = parameters(node)
            if node.op == "cast":
                params = (dtype_named(str(params[0])),)
            steps.append(Step(node.op, args, params))
            index[node] = inputs + len(steps) - 1
        return index[node]

    visit(tree)
    return Program(tuple(sorted(leaves(tree))), tuple(steps))


def evaluate(expression: Expression | str, env: Mapping[str, Tensor], into: Tensor | None = None) -> Tensor:
    """The expression's value where each leaf is the tensor `env` gives it, written to `into` if that is given.

    Leaves broadcast against each other as in torch: rows (R, I) with a weight of each row (R, 1).
    """
    return compiled(expression).run(env, into)[-1]


def result_dtype(expression: Expression | str, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype of the expression's value for floating-point leaves of these dtypes, found without any tensor."""
    program = compiled(expression)
    found = [dtypes[name] for name in program.leaves]
    for step in program.steps:
        if step.op == "cast":
            found.append(step.params[0])
        else:
            found.append(functools.reduce(torch.promote_types, (found[a] for a in step.args if isinstance(a, int))))
    return found[-1]


def vjp(
    expression: Expression | str, env: Mapping[str, Tensor], wanted: Collection[str], into: Tensor | None = None
) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """The expression's value, written to `into` if that is given, and its pullback.

    The pullback takes the gradient of the value (same shape and dtype) and returns the gradient of each leaf in
    `wanted` that the expression reads, in the leaf's own shape and dtype.
    """
    program = compiled(expression)
    values = program.run(env, into)

    def pullback(grad: Tensor) -> dict[str, Tensor]:
        return _pull(program, values, grad, wanted)

    return values[-1], pullback


def _pull(program: Program, values: Sequence[Tensor], grad: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    live = [name in wanted for name in program.leaves]
    for step in program.steps:
        live.append(any(live[arg] for arg in step.args if isinstance(arg, int)))
    grads: list[Tensor | None] = [None] * len(values)
    grads[-1] = grad if live[-1] else None
    for position in range(len(values) - 1, len(program.leaves) - 1, -1):
        step, upstream = program.steps[position - len(program.leaves)], grads[position]
        if upstream is None:
            continue
        needs = tuple(isinstance(arg, int) and live[arg] for arg in step.args)
        _, backward = OPERATORS[step.op]
        downstream = backward(upstream, _arguments(step, values), values[position], step.params, needs)
        grads[position] = None
        for arg, value in zip(step.args, downstream, strict=True):
            if isinstance(arg, int) and live[arg] and value is not None:
                fitted = _fit(value, values[arg])
                previous = grads[arg]
                grads[arg] = fitted if previous is None else previous + fitted
    return {name: g for name, g in zip(program.leaves, grads, strict=False) if g is not None}


def _fit(grad: Tensor, value: Tensor) -> Tensor:
    """As autograd's engine validates a gradient: summed over broadcast dimensions, then cast."""
    return grad.sum_to_size(value.shape).to(value.dtype) if grad.shape != value.shape else grad.to(value.dtype)
