"""Expressions: text and tree are exact inverses; values and gradients are torch's own, at ties and infinities too."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from moecompile.codegen.expression import (
    OPERATIONS,
    Apply,
    Constant,
    Expression,
    Leaf,
    leaves,
    parameters,
    parse,
    to_text,
)
from moecompile.runtime.elementwise import OPERATORS, compiled, evaluate, result_dtype, vjp

GPT_OSS = "mul(add(clamp(up, -7.0, 7.0), 1), mul(clamp(gate, None, 7.0), sigmoid(mul(clamp(gate, None, 7.0), 1.702))))"
EDGES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 6.0, 7.0, 20.0, 88.0, 89.0, 100.0, 1e-30, 1e30, math.inf)
POINTS = (*EDGES, *(-edge for edge in EDGES), math.nan)
CONSTANTS = ("0", "1", "2", "3", "-1", "0.5", "-1.5", "inf")
PARAMETERS = {
    "clamp": ("-7, 7", "None, 7.0", "-1.0", "0.5, 3"),
    "gelu": ("none", "tanh"),
    "softplus": ("1.0, 20.0", "2.0, 3"),
    "leaky_relu": ("0.01", "0.3", "-0.5"),
    "elu": ("1.0", "0.3"),
    "celu": ("1.0", "0.3"),
}


def random_tree(rng: random.Random, depth: int) -> Expression:
    if depth == 0 or rng.random() < 0.2:
        return Leaf(rng.choice(("x", "gate", "up", "hidden", "weight", "exp")))
    op, signature = rng.choice(sorted(OPERATIONS.items()))
    args = [random_tree(rng, depth - 1) for _ in range(signature.arguments)]
    if len(args) == 2 and rng.random() < 0.4:
        scalars = (0, 1, True, False, -0.0, 1.702, 1e-30, -1e30, math.inf, -math.inf, math.nan, 2**70, rng.random())
        args[rng.randrange(2)] = Constant(rng.choice(scalars))
    params: list[float | str | None] = [rng.choice((None, 7.0, -1, math.inf)) for _ in signature.parameters]
    if op == "cast":
        params = [rng.choice(("float32", "bfloat16"))]
    else:
        params = params[: rng.randint(0, len(params))]
    return Apply(op, tuple(args), tuple(params))


def test_text_and_tree_are_inverses():
    rng = random.Random(0)
    for _ in range(400):
        tree = random_tree(rng, 4)
        text = to_text(tree)
        assert parse(text) == tree
        assert hash(parse(text)) == hash(tree)
        assert to_text(parse(text)) == text


@pytest.mark.parametrize("text", ["gate", "clamp(gate, None, 7.0)", "gelu(x, tanh)", "cast(gate, float32)", GPT_OSS])
def test_written_form_is_kept(text: str):
    assert to_text(parse(text)) == text


def test_spaces_do_not_matter():
    assert parse(" mul( silu(gate) ,up )") == parse("mul(silu(gate), up)")


def test_constants_are_equal_when_they_print_the_same():
    assert len({Constant(1), Constant(1.0), Constant(True), Constant(0.0), Constant(-0.0)}) == 5
    assert Constant(math.nan) == Constant(math.nan)
    assert parse("clamp(x, 0)") != parse("clamp(x, 0.0)")


def test_leaves_and_parameters():
    assert leaves(parse(GPT_OSS)) == {"gate", "up"}
    assert parameters(Apply("softplus", (Leaf("x"),), (2.0,))) == (2.0, 20.0)
    assert parameters(Apply("clamp", (Leaf("x"),))) == (None, None)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("mul(x)", "mul takes 2"),
        ("mul(1, 2)", "at least one argument that is no constant"),
        ("swish(x)", "unknown operation 'swish'"),
        ("mul(x, y", "at position 8"),
        ("mul(x, y) z", "expected the end, got 'z'"),
        ("", "at position 0"),
        ("clamp(x, 1, 2, 3)", r"parameters are \(min, max\)"),
        ("cast(x)", r"parameters are \(dtype\)"),
        ("None", "None is a parameter"),
        ("add(x, $)", "at position 7"),
        ("gate up", "expected the end"),
    ],
)
def test_what_cannot_be_parsed_is_named(text: str, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        parse(text)


def test_wrong_nodes_are_refused():
    with pytest.raises(ValueError, match="identifier"):
        Leaf("inf")
    with pytest.raises(TypeError, match="bool, int or float"):
        Constant("one")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name of a torch dtype"):
        evaluate("cast(x, float33)", {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="name of a torch dtype"):
        evaluate("cast(x, Tensor)", {"x": torch.ones(1)})


def spellings(op: str) -> list[str]:
    if op == "cast":
        return ["mul(cast(a, float32), a)", "mul(cast(a, bfloat16), a)"]
    if OPERATIONS[op].arguments == 1:
        return [f"{op}(a)" if not text else f"{op}(a, {text})" for text in PARAMETERS.get(op, ("",))]
    scalar = [form.format(op, constant) for constant in CONSTANTS for form in ("{}(a, {})", "{0}({1}, a)")]
    return [f"{op}(a, b)", f"{op}(a, a)", *scalar]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_values_and_gradients_are_those_of_autograd(op: str, dtype: torch.dtype):
    """Bit for bit, at every pair of ties, signed zeros, large values, infinities and NaN."""
    points = torch.tensor(POINTS, dtype=dtype)
    a, b = (side.flatten() for side in torch.meshgrid(points, points, indexing="ij"))
    torch.manual_seed(0)
    for text in spellings(op):
        env = {"a": a if "b" in text else points, "b": b}
        env = {name: env[name].clone().requires_grad_() for name in sorted(leaves(parse(text)))}
        expected = evaluate(text, env)
        grad = torch.randn_like(expected)
        grads = torch.autograd.grad(expected, list(env.values()), grad, allow_unused=True, materialize_grads=True)
        value, pullback = vjp(text, {name: leaf.detach() for name, leaf in env.items()}, set(env))
        found = pullback(grad)
        assert value.dtype == result_dtype(text, dict.fromkeys(env, dtype))
        torch.testing.assert_close(value, expected.detach(), rtol=0, atol=0, equal_nan=True)
        for name, expected_grad in zip(env, grads, strict=True):
            torch.testing.assert_close(
                found[name], expected_grad, rtol=0, atol=0, equal_nan=True, msg=f"{text}: {name}"
            )


def test_the_reference_of_that_test_is_the_function_models_call():
    """`evaluate` above is compared with itself under autograd, so it has to be the plain torch spelling."""
    gate, up = torch.randn(2, 5, 8).unbind()
    functional = torch.nn.functional
    clamped = gate.clamp(max=7.0)
    expected = (up.clamp(-7.0, 7.0) + 1) * (clamped * torch.sigmoid(clamped * 1.702))
    assert torch.equal(evaluate(GPT_OSS, {"gate": gate, "up": up}), expected)
    for op in ("silu", "mish", "hardswish", "hardsigmoid", "relu6", "selu", "gelu", "logsigmoid", "softplus"):
        assert torch.equal(evaluate(f"{op}(x)", {"x": gate}), getattr(functional, op)(gate))
    for op in ("exp", "log1p", "rsqrt", "reciprocal", "tanh", "erf", "square", "sign", "abs", "neg", "sqrt", "relu"):
        assert torch.equal(evaluate(f"{op}(x)", {"x": up.abs()}), getattr(torch, op)(up.abs()))
    assert torch.equal(evaluate("sub(1, x)", {"x": gate}), 1 - gate)
    assert torch.equal(evaluate("div(3, x)", {"x": gate}), 3 / gate)
    assert OPERATORS.keys() == OPERATIONS.keys()


def test_promotion_and_broadcasting_are_torchs():
    torch.manual_seed(0)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for x_dtype, weight_dtype in itertools.product(dtypes, dtypes):
        x = torch.randn(6, 4, dtype=x_dtype, requires_grad=True)
        weight = torch.rand(6, 1, dtype=weight_dtype, requires_grad=True)
        text = "add(mul(cast(silu(x), float32), 3.5), mul(x, weight))"
        expected = torch.nn.functional.silu(x).float() * 3.5 + x * weight
        grad = torch.randn_like(expected)
        env = {"x": x.detach(), "weight": weight.detach()}
        value, pullback = vjp(text, env, {"x", "weight"})
        assert value.dtype == expected.dtype == result_dtype(text, {"x": x_dtype, "weight": weight_dtype})
        assert torch.equal(value, expected)
        found = pullback(grad)
        for name, leaf in (("x", x), ("weight", weight)):
            (expected_grad,) = torch.autograd.grad(expected, leaf, grad, retain_graph=True)
            assert found[name].dtype == leaf.dtype
            torch.testing.assert_close(found[name], expected_grad, rtol=0, atol=0)


def test_only_what_is_wanted_is_differentiated():
    env = {"gate": torch.randn(3), "up": torch.randn(3)}
    _, pullback = vjp("mul(silu(gate), up)", env, {"up"})
    assert pullback(torch.ones(3)).keys() == {"up"}
    _, pullback = vjp("mul(silu(gate), up)", env, set())
    assert pullback(torch.ones(3)) == {}


def test_equal_subexpressions_are_computed_once():
    assert [step.op for step in compiled(GPT_OSS).steps].count("clamp") == 2
    assert compiled(GPT_OSS) is compiled(GPT_OSS)
