"""The operators of the namespace `moecompile`: schemas, fake kernels, torch kernels and autograd.

    plan(expert_ids, num_experts) -> (counts, offsets, slots, order)
    experts(x, weights, offsets, slots, order, w_in, w_out, w_up, b_in, b_up, b_out, ...) -> result
    experts_forward(the same) -> (result, hidden)
    experts_backward(grad, hidden, the same, needs) -> the needed gradients

`experts` differentiates through `experts_forward` and `experts_backward`, so that AOTAutograd's graphs hold `experts`
in inference and the other two in training.

Shapes, for T tokens of H features, K experts a token, E experts of inner size I, results of H2 features:

    expert_ids (T, K) any integer dtype; -1 means no expert, any other id outside [0, E) is an error
    counts (E,) int32     rows of each expert
    offsets (E,) int32    the end of each expert's rows
    slots (T, K) int32    the row of an assignment in expert order, -1 if it has no expert
    order (T*K,) int32    the assignment t*K+k of each row, -1 beyond offsets[-1]; stable, so token-major in an expert
    x (T, H); weights (T, K) or None
    w_in (E, N, H), or (E, H, N) if w_in_transposed; w_up like w_in, only for gate_up="separate"
    w_out (E, H2, I), or (E, I, H2) if w_out_transposed
    b_in (E, N), b_up (E, I), b_out (E, H2)
    gate_up: "halves" (N = 2I, gate first), "interleaved" (N = 2I, gate at even features), "separate" (N = I, w_up
        holds the other), "single" (N = I, no gate)
    result (T, H2) in out_dtype, or in the dtype of the output expression's value
    hidden (T*K, N), or (T*K, 2I) for "separate": GEMM1's rows with bias; anything beyond offsets[-1]
    needs: bools for (x, weights, w_in, w_out, w_up, b_in, b_up, b_out)
    kernels: None (moecompile's own where the device has them) or "reference" (PyTorch's)

`input`, `activation` and `output` are expressions (`moecompile.codegen.expression`) of the leaves x; gate and up, or
hidden; out; and, in each, weight. Wrong shapes raise ValueError, wrong dtypes TypeError, wrong ids IndexError on the
CPU and a device-side assertion elsewhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

ARGUMENTS = (
    "Tensor x, Tensor? weights, Tensor offsets, Tensor slots, Tensor order, Tensor w_in, Tensor w_out, "
    "Tensor? w_up=None, Tensor? b_in=None, Tensor? b_up=None, Tensor? b_out=None, *, str activation, str gate_up, "
    'str input="x", str output="mul(out, weight)", bool w_in_transposed=False, bool w_out_transposed=False, '
    "ScalarType? out_dtype=None, str? kernels=None"
)
SCHEMAS = (
    "plan(Tensor expert_ids, int num_experts) -> (Tensor counts, Tensor offsets, Tensor slots, Tensor order)",
    f"experts({ARGUMENTS}) -> Tensor",
    f"experts_forward({ARGUMENTS}) -> (Tensor out, Tensor hidden)",
    f"experts_backward(Tensor grad, Tensor hidden, {ARGUMENTS}, bool[] needs) -> Tensor[]",
)


def _late(module: str, function: str) -> Callable[..., Any]:
    """The function of that module, imported when it is first called: `import moecompile` only registers."""
    found: Callable[..., Any] | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f"moecompile.runtime.{module}"), function)
        return found(*args, **kwargs)

    return call


library = torch.library.Library("moecompile", "DEF")
for _schema in SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name in ("plan", "experts", "experts_forward", "experts_backward"):
    library.impl(_name, _late("kernels", _name), "CompositeExplicitAutograd")
    library.impl(_name, _late("autograd", "batched"), "FuncTorchBatched")
    torch.library.register_fake(f"moecompile::{_name}", _late("kernels", f"fake_{_name}"), lib=library)
for _name in ("experts", "experts_forward", "experts_backward"):
    library.impl(_name, _late("autograd", _name), "Autograd")
