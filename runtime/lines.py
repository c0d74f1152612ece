"""Rows in FP8 that travel between ranks: each a line of bytes, its values and then its scales.

    lines = to_lines(x)                     (T, W) for x (T, H): H values, ceil(H / 128) scales, in pieces of 16 bytes
    values, scales = from_lines(lines, H)   as `quantize` of the same x

Between operators lines are said to be bfloat16, W numbers of two bytes: so whatever exchanges rows takes them, and
looks at none. Of graphs AOTAutograd's alone have them (passes/quantized_travel.py), and they have no derivative. What
`exchanged_experts_forward` saves of them are bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.runtime.quantize import ALONG_FEATURES, BLOCK, E4M3, POWER_OF_TWO, blocks_in, quantize

DTYPES = (torch.bfloat16, torch.float16)
"""Of x."""


def width(features: int) -> int:
    """W."""
    return (features + -(-4 * blocks_in(features, BLOCK) // 16) * 16) // 2


def parts(lines: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Where values (T, H) and scales (T, ceil(H / 128)) are in lines of any dtype."""
    data, end = lines.view(torch.uint8), features + 4 * blocks_in(features, BLOCK)
    return data[:, :features].view(E4M3), data[:, features:end].view(torch.float32)


def are_parts(values: Tensor, scales: Tensor) -> bool:
    """Whether these lie in lines, as `parts` gives them."""
    data, features = values.untyped_storage(), values.shape[1]
    alike = data.data_ptr() == scales.untyped_storage().data_ptr() and values.stride(0) == 4 * scales.stride(0)
    return alike and values.stride(0) == 2 * width(features) and not values.is_contiguous()


def takes(features: int) -> bool:
    """Whether rows of so many features may travel so: whole pieces of 16 bytes, as all kernels read them."""
    return features % 16 == 0


def to_lines(x: Tensor, *, scale_format: str = POWER_OF_TWO) -> Tensor:
    """Rows quantised 1 x 128, each with its scales behind it: (T, W) bfloat16 that stand for bytes.

    Args:
        x: (T, H) bfloat16 or float16.
        scale_format: one of SCALE_FORMATS of `moecompile.runtime.quantize`.

    Raises:
        ValueError: of another shape, or features that are no multiple of 16.
        TypeError: of another dtype.
    """
    from moecompile.runtime import linear_fp8

    _check(x)
    if linear_fp8.has_kernels(x.device):
        from moecompile.runtime import hopper_experts, hopper_quantize

        return hopper_quantize.quantize_lines(hopper_experts._lines(x), scale_format).view(torch.bfloat16)
    lines = x.new_zeros((x.shape[0], width(x.shape[1])), dtype=torch.bfloat16)
    for into, given in zip(parts(lines, x.shape[1]), quantize(x, ALONG_FEATURES, scale_format), strict=True):
        into.copy_(given)
    return lines


def fake_to_lines(x: Tensor, *, scale_format: str = POWER_OF_TWO) -> Tensor:
    """Its shape."""
    _check(x)
    return x.new_empty((x.shape[0], width(x.shape[1])), dtype=torch.bfloat16)


def from_lines(lines: Tensor, *, features: int) -> tuple[Tensor, Tensor]:
    """Values (T, H) e4m3 and scales (T, ceil(H / 128)) float32, contiguous, of lines (T, W).

    Raises:
        ValueError: lines of so many features are not that long.
        TypeError: they are no lines.
    """
    check_lines("from_lines", "lines", lines, features)
    values, scales = parts(lines.contiguous(), features)
    return values.view(torch.int32).contiguous().view(E4M3), scales.contiguous()  # a copy of bytes is slow


def fake_from_lines(lines: Tensor, *, features: int) -> tuple[Tensor, Tensor]:
    """Their shapes."""
    check_lines("from_lines", "lines", lines, features)
    scales = lines.new_empty((lines.shape[0], blocks_in(features, BLOCK)), dtype=torch.float32)
    return lines.new_empty((lines.shape[0], features), dtype=E4M3), scales


def check_lines(operator: str, name: str, lines: Tensor, features: int) -> None:
    """Raises ValueError or TypeError for what are no lines of so many features."""
    words = f"moecompile::{operator}: {name}"
    if not takes(features):
        raise ValueError(f"{words}: lines have a multiple of 16 features, got {features}")
    if lines.dim() != 2 or lines.shape[1] != width(features):
        expected = f"lines of {features} features, (rows, {width(features)})"
        raise ValueError(f"{words} must be {expected}, got {tuple(lines.shape)}")
    if lines.dtype != torch.bfloat16:
        raise TypeError(f"{words} must be bfloat16, as to_lines gives them, got {lines.dtype}")


def _check(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"moecompile::to_lines: x must be bfloat16 or float16, got {x.dtype}; cast it first")
    if x.dim() != 2 or not takes(x.shape[1]):
        raise ValueError(
            f"moecompile::to_lines: x must have shape (rows, a multiple of 16 features), got {tuple(x.shape)}"
        )
