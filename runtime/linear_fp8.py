"""A linear layer in FP8, below autograd: what the operators accept, torch kernels and fake kernels.

    x_q = quantize(x), w_q = quantize_weights(weight)       y = x_q @ w_q.T + bias, rounded

    g   = quantize(grad)                                    of_x = g @ w_q, rounded
    of_weight = g'.T @ x', rounded                          of_bias = sum of grad over tokens, in float32, rounded

where g' is g quantised once more with scales for 128 tokens, and x' is x_q shifted to one scale for 128 x 128: these
products contract along tokens, cut into blocks of 128. It is the recipe of `moecompile.runtime.fp8_reference` for one
expert (DeepSeek-V3, section 3.3). Here operands are dequantised and multiplied in float32.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from moecompile.runtime import quantize as quantizer
from moecompile.runtime.autocast import exact
from moecompile.runtime.contract import expect_shape
from moecompile.runtime.fp8_contract import GEMM_DTYPES, NOTHING, checked, weight_specs
from moecompile.runtime.quantize import (
    ALONG_FEATURES,
    ALONG_TOKENS,
    BLOCK,
    DTYPES,
    E4M3,
    SQUARE,
    blocks_in,
    dequantize,
    pad,
    requantize_along_tokens,
    to_square_blocks,
)

LINE = 16
"""Output features come in whole lines of 16 bytes."""
NAMES = ("values", "scales", "values_t", "scales_t")


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values (..., K) and float32 scales (..., ceil(K / 128)) of x (..., K), a scale for each 1x128."""
    _check_quantize(x)
    with exact(x):
        return quantizer.quantize(x, ALONG_FEATURES) if x.dim() > 1 else _one(x)


def fake_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the values and the scales."""
    _check_quantize(x)
    scales = x.new_empty((*x.shape[:-1], blocks_in(x.shape[-1], BLOCK)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=E4M3), scales


def linear_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, scales: Tensor, quantized: Sequence[Tensor]
) -> Tensor:
    """The result (..., N) in x's dtype."""
    _check(x, weight, bias, values, scales, quantized)
    shape = (*x.shape[:-1], weight.shape[0])
    with exact(x):
        fused = _hopper(x.device)
        if fused is not None and fused.takes(weight, values, quantized):
            return fused.forward(weight, bias, _rows(values), _rows(scales), quantized).view(shape)
        matrix = dequantize(quantized[0], quantized[1], SQUARE)[: weight.shape[0]]
        product = _rows(dequantize(values, scales, ALONG_FEATURES)) @ matrix.mT
        product = product if bias is None else product + bias.to(torch.float32)
        return product.to(x.dtype).view(shape)


def fake_linear_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, scales: Tensor, quantized: Sequence[Tensor]
) -> Tensor:
    """Shape and dtype of the result."""
    _check(x, weight, bias, values, scales, quantized)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_fp8_backward(
    grad: Tensor,
    weight: Tensor,
    values: Tensor,
    scales: Tensor,
    quantized: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of x, weight and bias, for the result's gradient (..., N)."""
    _check_backward(grad, weight, values, scales, quantized)
    of_y, dtype = _rows(grad.to(weight.dtype)), weight.dtype
    found: list[Tensor] = []
    with exact(grad):
        fused = _hopper(grad.device)
        if fused is not None and fused.takes(weight, values, quantized):
            found = fused.backward(of_y.contiguous(), weight, _rows(values), _rows(scales), quantized, needs)
            return [found[0].view(values.shape), *found[1:]] if needs[0] else found
        of_x, of_weight, of_bias = needs
        g = quantizer.quantize(of_y, ALONG_FEATURES)
        if of_x:
            matrix = dequantize(quantized[2], quantized[3], SQUARE)[:, : weight.shape[0]]
            product = dequantize(*g, ALONG_FEATURES) @ matrix.mT
            found.append(product.to(dtype).view(values.shape))
        if of_weight:
            along = dequantize(*requantize_along_tokens(*g), ALONG_TOKENS)
            x = dequantize(*to_square_blocks(_rows(values), _rows(scales)), SQUARE)
            found.append((along.mT @ x).to(dtype))
        if of_bias:
            found.append(of_y.to(torch.float32).sum(0).to(dtype))
    return found


def fake_linear_fp8_backward(
    grad: Tensor,
    weight: Tensor,
    values: Tensor,
    scales: Tensor,
    quantized: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Shapes and dtypes of the needed gradients."""
    _check_backward(grad, weight, values, scales, quantized)
    shapes = (tuple(values.shape), tuple(weight.shape), (weight.shape[0],))
    return [weight.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


@functools.cache
def _hopper(device: torch.device) -> ModuleType | None:
    """The module of the fused kernels, if the device runs them."""
    if device.type != "cuda":
        return None
    from moecompile.runtime import hopper

    return importlib.import_module("moecompile.runtime.hopper_linear") if hopper.serves(device) else None


def _one(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = quantizer.quantize(x.unsqueeze(0), ALONG_FEATURES)
    return values.squeeze(0), scales.squeeze(0)


def _rows(tensor: Tensor) -> Tensor:
    """(..., F) as (T, F)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _check_quantize(x: Tensor) -> None:
    if x.dim() == 0:
        raise ValueError("moecompile::quantize: x must have a last dimension of features, got a scalar")
    if x.dtype not in DTYPES:
        words = f"x must be bfloat16, float16 or float32, got {x.dtype}; cast it first"
        raise TypeError(f"moecompile::quantize: {words}")


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, scales: Tensor, quantized: Sequence[Tensor]
) -> None:
    _check_weight(weight, quantized, "linear_fp8", backward=False)
    (n, k), operator = weight.shape, "linear_fp8"
    for name, tensor, shape, dtype in (
        ("x", x, (*x.shape[:-1], k), weight.dtype),
        ("values", values, tuple(x.shape), E4M3),
        ("scales", scales, (*x.shape[:-1], k // BLOCK), torch.float32),
        ("bias", bias, (n,), weight.dtype),
    ):
        if tensor is None:
            continue
        expect_shape(operator, tensor, name, shape, "by weight and x")
        if tensor.dtype != dtype:
            raise TypeError(f"moecompile::{operator}: {name} must be {dtype}, got {tensor.dtype}; cast it")


def _check_weight(weight: Tensor, quantized: Sequence[Tensor], operator: str, backward: bool) -> None:
    """Raises ValueError or TypeError unless the matrix can be multiplied in FP8, and its copies are its copies."""
    if weight.dim() != 2 or weight.shape[1] % BLOCK or weight.shape[0] % LINE:
        words = f"(N, K), N a multiple of {LINE} and K of {BLOCK}, got {tuple(weight.shape)}"
        raise ValueError(f"moecompile::{operator}: weight must have shape {words}; keep this layer in its precision")
    if weight.dtype not in GEMM_DTYPES:
        raise TypeError(f"moecompile::{operator}: weight must be bfloat16 or float16, got {weight.dtype}; cast it")
    hint = "pass what quantize_weights(weight) returned" + ", with backward=True" * backward
    there = backward or any(tensor.shape != NOTHING for tensor in quantized[2:])
    specs = weight_specs((), pad(weight.shape[0]), weight.shape[1], there)
    checked(operator, "quantized", NAMES, quantized, specs, hint)


def _check_backward(grad: Tensor, weight: Tensor, values: Tensor, scales: Tensor, quantized: Sequence[Tensor]) -> None:
    operator = "linear_fp8_backward"
    _check_weight(weight, quantized, operator, backward=True)
    outer, (n, k) = tuple(values.shape[:-1]), weight.shape
    expect_shape(operator, grad, "grad", (*outer, n), "by values and weight")
    expect_shape(operator, values, "values", (*outer, k), "by weight")
    expect_shape(operator, scales, "scales", (*outer, k // BLOCK), "by values")
    if grad.dtype not in DTYPES:
        raise TypeError(f"moecompile::{operator}: grad must be bfloat16, float16 or float32, got {grad.dtype}; cast it")
