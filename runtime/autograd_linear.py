"""The derivative of `moecompile::linear_fp8`, and what stands above autograd for the pieces that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime import linear_fp8 as linear
from moecompile.runtime.derivatives import are_plain, differentiates, refusing, trace_of
from moecompile.runtime.quantize import POWER_OF_TWO

Parts = list[Tensor]
LINEAR = "linear_fp8"
COPIES = 4
"""Of a matrix: values, scales, and both transposed."""


class _LinearFp8(torch.autograd.Function):
    """scaled_mm with its derivative, two products more; of x the quantised copy is kept, of weight the transposed.

    See `moecompile.runtime.linear_fp8` for the formulas.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: str | None,
        scale_format: str,
        trace: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        scales: Tensor,
        *quantized: Tensor,
    ) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[3:5]
        if of_x:
            linear.check_copies_for_backward(quantized)
        ctx.kernels, ctx.scale_format = kernels, scale_format
        # each gradient's operands, and no other's, are held
        rows, turned = (values, scales) if of_weight else (None, None), quantized[2:] if of_x else (None, None)
        ctx.save_for_backward(trace, weight, *rows, *turned)
        with torch._C._AutoDispatchBelowAutograd():
            return _product(weight, bias, values, scales, quantized, kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trace, weight, values, scales, *turned = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[3:6]
        (features, inner), ops, found = weight.shape, torch.ops.moecompile, list[Tensor]()
        how = {"scale_format": ctx.scale_format}
        sizes = {"out_features": inner, "dtype": weight.dtype, "kernels": ctx.kernels}
        with torch._C._AutoDispatchBelowAutograd():
            grad = grads[0].to(weight.dtype)
            cast = ops.quantize_gradient if of_weight else ops.quantize
            g = cast(grad, **how) if of_weight or of_x else ()
            if of_x:
                found.append(ops.scaled_mm(*g[:2], *turned, **sizes))
            if of_weight:
                x_t = ops.along_tokens(values, scales, scale_block="128x128", **how)
                found.append(ops.scaled_mm(*g[2:], *x_t, **sizes))
            if of_bias:
                found.append(grad.reshape(-1, features).sum(0, dtype=torch.float32).to(weight.dtype))
        parts = iter(refusing(found, LINEAR, (grads[0], trace, weight)) if torch.is_grad_enabled() else found)
        needed = (next(parts) if needed else None for needed in (of_x, of_weight, of_bias))
        return (None, None, None, *needed, None, None, *(None,) * COPIES)


def quantize(x: Tensor, **attributes: Any) -> Any:
    """Quantize above autograd, as quantize_weights is: what it is the quantised copy of gets the gradient."""
    differentiates((x,), "quantize")
    with torch._C._AutoDispatchBelowAutograd():
        return _of_linear("quantize", (x,))(x, **attributes)


def quantize_gradient(grad: Tensor, **attributes: Any) -> Any:
    """quantize_gradient above autograd: gradients of gradients are refused where they would come from."""
    differentiates((grad,), "quantize_gradient")
    with torch._C._AutoDispatchBelowAutograd():
        return _of_linear("quantize_gradient", (grad,))(grad, **attributes)


def along_tokens(values: Tensor, scales: Tensor, **attributes: Any) -> Any:
    """along_tokens above autograd: of numbers that nothing differentiates."""
    differentiates((values, scales), "along_tokens")
    with torch._C._AutoDispatchBelowAutograd():
        return _of_linear("along_tokens", (values, scales))(values, scales, **attributes)


def _of_linear(operator: str, tensors: Sequence[Tensor | None]) -> Any:
    """What computes an operator of linear layers: its function, where the dispatcher would go on to nothing else."""
    return getattr(linear if are_plain(tensors) else torch.ops.moecompile, operator)


def scaled_mm(*args: Any, **attributes: Any) -> Tensor:
    """scaled_mm above autograd: of numbers that nothing differentiates; `linear_fp8` is what has a derivative."""
    if differentiates(args, "scaled_mm"):
        raise NotImplementedError("moecompile::scaled_mm has no derivative; moecompile::linear_fp8 has one")
    with torch._C._AutoDispatchBelowAutograd():
        return _of_linear("scaled_mm", args)(*args, **attributes)


def linear_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, scales: Tensor, quantized: Parts, *,
    scale_format: str = POWER_OF_TWO, kernels: str | None = None,
) -> Tensor:  # fmt: skip
    """linear_fp8 above autograd: recorded where something requires grad; below it is scaled_mm, as graphs show it."""
    linear.check_linear(x, weight, bias, values, scales, quantized, scale_format, kernels)
    if differentiates((x, weight, bias), LINEAR):
        given = (trace_of(x), x, weight, bias, values, scales, *quantized)
        result: Tensor = _LinearFp8.apply(kernels, scale_format, *given)
        return result
    with torch._C._AutoDispatchBelowAutograd():
        return _product(weight, bias, values, scales, quantized, kernels)


def _product(
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    scales: Tensor,
    quantized: Sequence[Tensor],
    kernels: str | None,
) -> Tensor:
    given = (values, scales, *quantized[:2], bias)
    run = _of_linear("scaled_mm", given)
    found: Tensor = run(*given, out_features=weight.shape[0], dtype=weight.dtype, kernels=kernels)
    return found
