"""A linear layer in FP8 and the pieces it is made of, below autograd: contracts, torch kernels and fake kernels.

    x_q = quantize(x), w_q = quantize_weights(weight)       y = scaled_mm(x_q, w_q, bias)

    g, g_t = quantize_gradient(grad)                        of_x = scaled_mm(g, w_q transposed)
    x_t = along_tokens(x_q, "128x128")                     of_weight = scaled_mm(g_t, x_t)

The gradient of the weight contracts along tokens, and FP8 products along memory: so its operands are token-major
copies, filled up with zeros to whole blocks of 128 tokens. g is quantised once more, with a scale for 128 tokens; x_q
is shifted to one scale for 128x128. It is the recipe of `moecompile.runtime.fp8_reference` for one expert (DeepSeek-V3,
section 3.3). Here operands are dequantised and multiplied in float32; on Hopper `moecompile.runtime.hopper_linear`
computes what it takes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moecompile.runtime import quantize as quantizer
from moecompile.runtime.autocast import exact
from moecompile.runtime.contract import check_kernels, expect_shape
from moecompile.runtime.fp8_contract import GEMM_DTYPES, NOTHING, check_scale_format, checked, weight_specs
from moecompile.runtime.once import warn_once
from moecompile.runtime.quantize import (
    ALONG_FEATURES,
    BLOCK,
    DTYPES,
    E4M3,
    POWER_OF_TWO,
    SQUARE,
    blocks_in,
    dequantize,
    pad,
    requantize_along_tokens,
    to_square_blocks,
)
from moecompile.runtime.remembered import CALLS

LINE = 16
"""Output features come in whole lines of 16 bytes."""
SCALE_BLOCKS = ("1x128", "128x128")
"""What a scale of a token-major copy is for: of a feature and 128 tokens, or of 128 features and 128 tokens."""
NAMES = ("values", "scales", "values_t", "scales_t")


def quantize(x: Tensor, *, scale_format: str = POWER_OF_TWO) -> tuple[Tensor, Tensor]:
    """e4m3 values (..., K) and float32 scales (..., ceil(K / 128)) of x (..., K), a scale for each 1x128.

    Scales are transposed in memory, those of a block of features together, as products read them.
    """
    _check_quantize(x, scale_format)

    def run(fused: ModuleType | None) -> list[Tensor]:
        if fused is None or not fused.takes_rows(x):
            return list(quantize_in_torch(x, scale_format=scale_format))
        values, scales = fused.quantize(_rows(x), scale_format)
        return [values.view(x.shape), _spread(scales, x)]

    values, scales = _remembered("quantize", (x,), {"scale_format": scale_format}, run)
    return values, scales


def quantize_in_torch(x: Tensor, *, scale_format: str = POWER_OF_TWO) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's operators, as Inductor fuses them with what made x (passes/decompose.py)."""
    values, scales = quantizer.quantize(_rows(x), ALONG_FEATURES, scale_format)
    return values.view(x.shape), _spread(_laid_out(scales.t()), x)


def fake_quantize(x: Tensor, *, scale_format: str = POWER_OF_TWO) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of the values and the scales."""
    _check_quantize(x, scale_format)
    scales = x.new_empty((blocks_in(x.shape[-1], BLOCK), *x.shape[:-1]), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=E4M3), scales.movedim(0, -1)


def quantize_gradient(grad: Tensor, *, scale_format: str = POWER_OF_TWO) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `quantize` gives for grad (..., N), and what `along_tokens` gives for that with "1x128"."""
    _check_quantize(grad, scale_format, "quantize_gradient")

    def run(fused: ModuleType | None) -> list[Tensor]:
        if fused is not None and fused.takes_rows(grad):
            values, scales, copy, copy_scales = fused.quantize_gradient(_rows(grad), scale_format)
            return [values.view(grad.shape), _spread(scales, grad), copy, copy_scales.t()]
        values, scales = quantize_in_torch(grad, scale_format=scale_format)
        return [values, scales, *_along_tokens_in_torch(values, scales, "1x128")]

    attributes = {"scale_format": scale_format}
    values, scales, copy, copy_scales = _remembered("quantize_gradient", (grad,), attributes, run)
    return values, scales, copy, copy_scales


def fake_quantize_gradient(grad: Tensor, *, scale_format: str = POWER_OF_TWO) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of both."""
    _check_quantize(grad, scale_format, "quantize_gradient")
    values, scales = fake_quantize(grad)
    return values, scales, *fake_along_tokens(values, scales, scale_block="1x128")


def along_tokens(
    values: Tensor, scales: Tensor, *, scale_block: str, scale_format: str = POWER_OF_TWO
) -> tuple[Tensor, Tensor]:
    """Quantised tokens (..., F), token-major (F, P), and their scales (F, P / 128) or (ceil(F / 128), P / 128).

    These are powers of two; `scale_format` is that of the tokens' scales.
    """
    _check_along_tokens(values, scales, scale_block, scale_format)

    def run(fused: ModuleType | None) -> list[Tensor]:
        if fused is None or not fused.takes(_rows(values)):
            return _along_tokens_in_torch(values, scales, scale_block)
        per_feature = scale_block == "1x128"
        return list(fused.along_tokens(_rows(values), _rows(scales), scale_format, per_feature=per_feature))

    attributes = {"scale_block": scale_block, "scale_format": scale_format}
    copy, copy_scales = _remembered("along_tokens", (values, scales), attributes, run)
    return copy, copy_scales


def _along_tokens_in_torch(values: Tensor, scales: Tensor, scale_block: str) -> list[Tensor]:
    rows = _rows(values)
    cast = requantize_along_tokens if scale_block == "1x128" else to_square_blocks
    turned, turned_scales = cast(rows, _rows(scales))
    filled = torch.nn.functional.pad(turned.view(torch.uint8), (0, 0, 0, pad(rows.shape[0]) - rows.shape[0]))
    kept = turned_scales.t() if scale_block == "1x128" else _laid_out(turned_scales.t())
    return [_laid_out(filled.t()).view(E4M3), kept]


def fake_along_tokens(
    values: Tensor, scales: Tensor, *, scale_block: str, scale_format: str = POWER_OF_TWO
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of the copy."""
    _check_along_tokens(values, scales, scale_block, scale_format)
    features, blocks = values.shape[-1], blocks_in(_count(values), BLOCK)
    copy = values.new_empty((features, blocks * BLOCK))
    if scale_block == "1x128":
        return copy, scales.new_empty((blocks, features)).t()
    return copy, scales.new_empty((blocks_in(features, BLOCK), blocks))


def scaled_mm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    dtype: torch.dtype,
    kernels: str | None = None,
) -> Tensor:
    """a (..., F) times b (N', K') transposed, of which the first `out_features` columns are: (..., out_features)."""
    given = (a, a_scales, b, b_scales, bias)
    attributes = {"out_features": out_features, "dtype": dtype, "kernels": kernels}

    def run(fused: ModuleType | None) -> list[Tensor]:
        _check_scaled_mm(a, a_scales, b, b_scales, bias, out_features, dtype, kernels)
        shape = (*a.shape[:-1], out_features)
        lines = dtype == torch.bfloat16 and out_features % LINE == 0
        if kernels is None and fused is not None and lines and fused.takes(_rows(a), b):
            return [fused.scaled_mm(_rows(a), _rows(a_scales), b, b_scales, bias, out_features).view(shape)]
        if kernels is None:
            _say_if_slow(a, fused, out_features, dtype)
        matrix = dequantize(b, b_scales, SQUARE)[:out_features, : a.shape[-1]]
        product = dequantize(_rows(a), _rows(a_scales), ALONG_FEATURES) @ matrix.mT
        product = product if bias is None else product + bias.to(torch.float32)
        return [product.to(dtype).view(shape)]

    return _remembered("scaled_mm", given, attributes, run)[0]


def fake_scaled_mm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    dtype: torch.dtype,
    kernels: str | None = None,
) -> Tensor:
    """Shape and dtype of the product."""
    _check_scaled_mm(a, a_scales, b, b_scales, bias, out_features, dtype, kernels)
    return a.new_empty((*a.shape[:-1], out_features), dtype=dtype)


def linear_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, scales: Tensor, quantized: Sequence[Tensor], *,
    scale_format: str = POWER_OF_TWO, kernels: str | None = None,
) -> Tensor:  # fmt: skip
    """The result (..., N) in x's dtype."""
    check_linear(x, weight, bias, values, scales, quantized, scale_format, kernels)
    matrix, of_matrix = quantized[:2]
    features, dtype = weight.shape[0], weight.dtype
    return scaled_mm(values, scales, matrix, of_matrix, bias, out_features=features, dtype=dtype, kernels=kernels)


def fake_linear_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, scales: Tensor, quantized: Sequence[Tensor], *,
    scale_format: str = POWER_OF_TWO, kernels: str | None = None,
) -> Tensor:  # fmt: skip
    """Shape and dtype of the result."""
    check_linear(x, weight, bias, values, scales, quantized, scale_format, kernels)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def has_kernels(device: torch.device) -> bool:
    """Whether the operators run kernels of ours there."""
    return _hopper(device) is not None


@functools.cache
def _hopper(device: torch.device) -> ModuleType | None:
    """The module of the fused kernels, if the device runs them."""
    if device.type != "cuda":
        return None
    from moecompile.runtime import hopper

    return importlib.import_module("moecompile.runtime.hopper_linear") if hopper.serves(device) else None


def _remembered(
    operator: str,
    tensors: Sequence[Tensor | None],
    attributes: Mapping[str, Any],
    run: Callable[[ModuleType | None], list[Tensor]],
) -> list[Tensor]:
    """What a call makes; on a GPU with fused kernels it is recorded for others like it."""
    given = next(tensor for tensor in tensors if tensor is not None)
    fused = _hopper(given.device)
    if fused is not None and (known := CALLS.again(operator, tensors, attributes)) is not None:
        return known
    with exact(given):
        return run(None) if fused is None else CALLS.first(operator, tensors, attributes, lambda: run(fused))


def _say_if_slow(a: Tensor, fused: ModuleType | None, out_features: int, dtype: torch.dtype) -> None:
    """Logs, once, that a GPU multiplies without kernels of ours, and why."""
    if a.numel() == 0 or (fused is None and a.device.type != "cuda"):
        return
    if fused is None:
        why = f"moecompile's kernels do not run on {a.device}, which is no Hopper GPU, or lacks what compiles them"
    elif dtype != torch.bfloat16:
        why = f"the model is in {dtype}; there are kernels for bfloat16"
    else:
        why = f"{a.shape[-1]} and {out_features} features are not both multiples of {LINE}"
    warn_once(f"linear layers in FP8 are emulated with PyTorch's operators, which is slow: {why}")


def _rows(tensor: Tensor) -> Tensor:
    """(..., F) as (T, F)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _spread(scales: Tensor, x: Tensor) -> Tensor:
    """Scales (blocks, T) as those (..., blocks) of x."""
    return scales.view(scales.shape[0], *x.shape[:-1]).movedim(0, -1)


def _laid_out(tensor: Tensor) -> Tensor:
    """Contiguous, dimensions of size 1 included, which PyTorch's `contiguous` leaves as they are."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _count(values: Tensor) -> int:
    """T of (..., F)."""
    count = 1
    for size in values.shape[:-1]:
        count *= size
    return count


def _check_quantize(x: Tensor, scale_format: str, operator: str = "quantize") -> None:
    check_scale_format(operator, scale_format)
    if x.dim() == 0:
        raise ValueError(f"moecompile::{operator}: x must have a last dimension of features, got a scalar")
    if x.dtype not in DTYPES:
        words = f"x must be bfloat16, float16 or float32, got {x.dtype}; cast it first"
        raise TypeError(f"moecompile::{operator}: {words}")


def _check_along_tokens(values: Tensor, scales: Tensor, scale_block: str, scale_format: str) -> None:
    operator = "along_tokens"
    check_scale_format(operator, scale_format)
    if scale_block not in SCALE_BLOCKS:
        raise ValueError(
            f"moecompile::{operator}: scale_block must be one of {', '.join(SCALE_BLOCKS)}; got {scale_block!r}"
        )
    _check_rows(operator, "values", values, "scales", scales)


def _check_rows(operator: str, name: str, values: Tensor, scales_name: str, scales: Tensor) -> None:
    """Raises ValueError or TypeError unless these are what `quantize` gives."""
    if values.dim() == 0:
        raise ValueError(f"moecompile::{operator}: {name} must have a last dimension of features, got a scalar")
    expect_shape(operator, scales, scales_name, (*values.shape[:-1], blocks_in(values.shape[-1], BLOCK)), f"by {name}")
    for each, tensor, dtype in ((name, values, E4M3), (scales_name, scales, torch.float32)):
        if tensor.dtype != dtype:
            raise TypeError(f"moecompile::{operator}: {each} must be {dtype}, got {tensor.dtype}; quantize makes it")


def _check_scaled_mm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
    kernels: str | None,
) -> None:
    operator = "scaled_mm"
    check_kernels(operator, kernels)
    _check_rows(operator, "a", a, "a_scales", a_scales)
    if dtype not in GEMM_DTYPES:
        raise TypeError(f"moecompile::{operator}: dtype must be bfloat16 or float16, got {dtype}")
    expect_shape(operator, b, "b", (pad(out_features), pad(a.shape[-1])), "by out_features and a, in whole blocks")
    expect_shape(operator, b_scales, "b_scales", (b.shape[0] // BLOCK, b.shape[1] // BLOCK), "by b")
    for name, tensor, kind in (("b", b, E4M3), ("b_scales", b_scales, torch.float32), ("bias", bias, dtype)):
        if tensor is not None and tensor.dtype != kind:
            raise TypeError(f"moecompile::{operator}: {name} must be {kind}, got {tensor.dtype}")
    if bias is not None:
        expect_shape(operator, bias, "bias", (out_features,), "by out_features")


def check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, scales: Tensor, quantized: Sequence[Tensor],
    scale_format: str, kernels: str | None = None,
) -> None:  # fmt: skip
    """Raises ValueError or TypeError unless the arguments of `linear_fp8` are of one layer."""
    operator = "linear_fp8"
    check_kernels(operator, kernels)
    check_scale_format(operator, scale_format)
    _check_weight(weight, quantized, operator)
    n, k = weight.shape
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


def _check_weight(weight: Tensor, quantized: Sequence[Tensor], operator: str) -> None:
    """Raises ValueError or TypeError unless the matrix can be multiplied in FP8, and its copies are its copies."""
    if weight.dim() != 2 or weight.shape[1] % BLOCK or weight.shape[0] % LINE:
        words = f"(N, K), N a multiple of {LINE} and K of {BLOCK}, got {tuple(weight.shape)}"
        raise ValueError(f"moecompile::{operator}: weight must have shape {words}; keep this layer in its precision")
    if weight.dtype not in GEMM_DTYPES:
        raise TypeError(f"moecompile::{operator}: weight must be bfloat16 or float16, got {weight.dtype}; cast it")
    there = any(tensor.shape != NOTHING for tensor in quantized[2:])
    specs = weight_specs((), pad(weight.shape[0]), weight.shape[1], there)
    checked(operator, "quantized", NAMES, quantized, specs, "pass what quantize_weights(weight) returned")


def check_copies_for_backward(quantized: Sequence[Tensor]) -> None:
    """Raises ValueError unless the transposed copies of a weight are there."""
    if any(tensor.shape == NOTHING for tensor in quantized[2:]):
        raise ValueError(
            "moecompile::linear_fp8: a gradient needs transposed copies of the weight; pass what "
            "quantize_weights(weight, backward=True) returned"
        )
