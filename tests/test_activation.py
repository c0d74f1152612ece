"""What the kernels compute between the products, compiled for the CPU, against torch: values and gradients."""

from __future__ import annotations

import ctypes
import itertools
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moecompile.codegen import instances
from moecompile.codegen.activation import print_struct
from moecompile.codegen.expression import OPERATIONS
from moecompile.runtime import elementwise

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

# ties and turns of the operations, both zeros, numbers at which exp overflows and underflows, no numbers
SPECIAL = (0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 7.0, -7.0, 20.0, 20.5, 0.5, -0.5, 100.0, -100.0, 1e30, -1e30, 1e-30)
NOT_FINITE = (math.inf, -math.inf, math.nan)
UNARY = sorted(op for op, signature in OPERATIONS.items() if signature.arguments == 1 and not signature.parameters)
PARAMETRIC = (
    "gelu(x)", "gelu(x, tanh)", "leaky_relu(x, 0.1)", "elu(x)", "elu(x, 0.5)", "celu(x, 2.0)", "softplus(x)",
    "softplus(x, 2.0, 6.0)", "clamp(x, None, 7.0)", "clamp(x, -3.0, 3.0)", "clamp(x, 0.5, None)", "cast(x, bfloat16)",
    "cast(x, float16)", "cast(x, float32)", "pow(x, 2)", "pow(x, 3.0)", "pow(2.0, x)", "div(1.0, x)", "sub(1, x)",
)  # fmt: skip
BINARY = tuple(f"{op}(x, y)" for op, signature in OPERATIONS.items() if signature.arguments == 2)
MODELS = {  # of transformers' architectures
    "swiglu": "mul(silu(x), y)",
    "geglu": "mul(gelu(x, tanh), y)",
    "gpt_oss": "mul(add(clamp(y, -7.0, 7.0), 1), mul(clamp(x, None, 7.0), sigmoid(mul(clamp(x, None, 7.0), 1.702))))",
    "squared_relu": "square(relu(x))",
    "fp32_silu": "mul(cast(silu(cast(x, float32)), bfloat16), y)",
    "tanh": "mul(tanh(x), y)",
    "the same twice": "mul(add(x, y), add(x, y))",
    "unused": "relu(x)",
}

PRELUDE = """
#include <math.h>
#include <stdint.h>
#include <string.h>
#define __device__
#define __forceinline__ inline
static inline float __int_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
namespace ptx {
static inline float round_bf16(float x) {
    uint32_t bits; memcpy(&bits, &x, 4);
    if (x == x) bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    return __int_as_float(bits);
}
static inline float round_f16(float x) { return (float)(_Float16)x; }
static inline float fast_exp(float x) { return expf(x); }
static inline float fast_reciprocal(float x) { return 1 / x; }
}
"""


def for_the_cpu(expression: str, folder: Path) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(x, y, gradient) -> (value, gradient of x, gradient of y), by the code that the kernels get."""
    header = instances.headers()["elementwise.cuh"].replace('#include "ptx.cuh"', "").replace("#pragma once", "")
    code = (
        PRELUDE
        + header
        + print_struct("Activation", expression, ("x", "y"))
        + """
extern "C" void run(int n, const float* x, const float* y, const float* g, float* v, float* dx, float* dy) {
    for (int i = 0; i < n; i++) {
        v[i] = Activation::value(x[i], y[i]);
        Activation::backward(g[i], x[i], y[i], dx[i], dy[i]);
    }
}
"""
    )
    source, built = folder / "activation.cpp", folder / "activation.so"
    source.write_text(code)
    flags = ("-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC")
    subprocess.run(["g++", *flags, "-o", built, source], check=True)
    library = ctypes.CDLL(str(built))

    def run(x: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        results = tuple(torch.full_like(x, 123.0) for _ in range(3))
        library.run(x.numel(), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y, grad, *results)))
        return results[0], results[1], results[2]

    return run


def inputs(finite: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    numbers = SPECIAL if finite else (*SPECIAL, *NOT_FINITE)
    pairs = torch.tensor(list(itertools.product(numbers, numbers)))
    pairs = torch.cat((pairs, torch.randn(500, 2) * 4))
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), torch.randn(len(pairs))


# Where PyTorch's vectorised code for CPUs differs from its code for GPUs, which is what the kernels stand in for: NaN
# passes the comparisons of these derivatives there, and erf(inf) is 1.
OF_GPUS = {"hardswish": math.isnan, "relu6": math.isnan, "selu": math.isnan, "elu": math.isnan, "celu": math.isnan}
OF_GPUS["gelu"] = math.isinf


def compare(expression: str, folder: Path, finite: bool = False) -> None:
    x, y, grad = inputs(finite)
    found = dict(zip(("value", "x", "y"), for_the_cpu(expression, folder)(x, y, grad), strict=True))
    read = [name for name in ("x", "y") if name in elementwise.compiled(expression).leaves]
    given: dict[str, Tensor] = {name: {"x": x, "y": y}[name].clone().requires_grad_() for name in read}
    value = elementwise.evaluate(expression, given)
    gradients = torch.autograd.grad(value, list(given.values()), grad.to(value.dtype))
    expected = {"value": value.detach().float(), "x": torch.zeros_like(x), "y": torch.zeros_like(x)}
    expected |= dict(zip(read, gradients, strict=True))
    excepted = OF_GPUS.get(expression.partition("(")[0], lambda _: False)
    compared = torch.tensor([not excepted(number) for number in x.tolist()])
    narrow = "cast" in expression  # torch rounds gradients on the way back through a cast, too
    for name, wanted in expected.items():
        tolerance = 2e-2 if narrow and name != "value" else 2e-5
        torch.testing.assert_close(found[name][compared], wanted[compared], rtol=tolerance, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("expression", [*(f"{op}(x)" for op in UNARY), *PARAMETRIC, *BINARY])
def test_an_operation(expression: str, tmp_path: Path) -> None:
    compare(expression, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_an_activation(name: str, tmp_path: Path) -> None:
    compare(MODELS[name], tmp_path, finite=True)


def test_equal_subexpressions_are_computed_once() -> None:
    text = print_struct("Activation", MODELS["gpt_oss"], ("x", "y"))
    value = text[: text.index("void backward")]
    assert value.count("clamp(x") == 1 and value.count("clamp(y") == 1


def test_nothing_is_simplified() -> None:
    text = print_struct("Activation", "mul(add(x, 0), 1)", ("x",))
    assert "elementwise::add(x, float(0.0))" in text and "elementwise::mul(v0, float(1.0))" in text


def test_what_cannot_be_printed_is_refused() -> None:
    with pytest.raises(ValueError, match="reads weight; there is only gate, up"):
        print_struct("Activation", "mul(gate, weight)", ("gate", "up"))
    with pytest.raises(ValueError, match="got a cast to float8_e5m2"):
        print_struct("Activation", "cast(x, float8_e5m2)", ("x",))
