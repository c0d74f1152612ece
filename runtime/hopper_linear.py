"""The pieces of a linear layer in FP8 on a Hopper GPU: the grouped GEMMs of the experts, for one group of rows.

    quantize(x)                       a scale for each 1x128
    quantize_gradient(grad)           the same, and its token-major copy, at once
    along_tokens(values, scales)      token-major copies for the gradient of the weight
    scaled_mm(a, b)                   a @ b.T

Where a product has too few tiles to keep the GPU busy, cuBLASLt's with the same scales, which has smaller tiles, is
sooner done (docs/perf.md): `fills`. What these do not take (`takes`, `takes_rows`) runs in PyTorch's operators
(`moecompile.runtime.linear_fp8`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

from moecompile.runtime import hopper_fp8_gemm, hopper_quantize
from moecompile.runtime.hopper_quantize import Matrices, QuantizedRows
from moecompile.runtime.hopper_tiles import MULTIPROCESSORS, ROWS
from moecompile.runtime.quantize import BLOCK, E4M3, blocks_in

COLUMNS = 256  # of a tile
FULL = 0.86
"""Share of the tiles' rounds that must be filled: cuBLASLt's products are 5 to 8 % slower in full rounds, and lose less
in those that are not (docs/perf.md)."""
PITCH = 4
"""Rows of transposed scales begin at a multiple of so many, as bulk copies need it."""


def takes(*values: Tensor) -> bool:
    """Whether the kernels read these e4m3 numbers: a token at least, whole lines of 16 bytes."""
    return all(each.numel() > 0 and each.shape[-1] % 16 == 0 for each in values)


def takes_rows(x: Tensor) -> bool:
    """Whether `quantize` reads these: 16 bits, a token at least, whole lines of 16 bytes."""
    return x.dtype in (torch.bfloat16, torch.float16) and takes(x)


def _in_lines(x: Tensor) -> Tensor:
    """The same where kernels can read it, contiguous from a multiple of 16 bytes: a copy, if it lies otherwise."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def quantize(x: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
    """Values (T, K) and transposed scales (ceil(K / 128), T) of x (T, K)."""
    x = _in_lines(x)
    rows = QuantizedRows(x.new_empty(x.shape, dtype=E4M3), x.new_empty(_blocks(x), x.shape[0], dtype=torch.float32))
    hopper_quantize.quantize_rows(x, None, rows, None, scale_format)
    return rows.values, rows.scales


def quantize_gradient(grad: Tensor, scale_format: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values (T, N) and transposed scales (ceil(N / 128), T) of grad (T, N), and of the token-major copy likewise."""
    rows, turned = hopper_quantize.quantize_gradient(_in_lines(grad), scale_format)
    return rows.values, rows.scales, turned.values, turned.scales


def along_tokens(values: Tensor, scales: Tensor, scale_format: str, *, per_feature: bool) -> tuple[Tensor, Tensor]:
    """The token-major copy (F, P) of (T, F), with scales (F, P / 128), or of 128 features (ceil(F / 128), P / 128)."""
    turned = hopper_quantize.transpose_rows(
        _in_lines(values), _by_block(scales, 1), per_column=per_feature, scale_format=scale_format
    )
    return turned.values, turned.scales.t() if per_feature else turned.scales


def scaled_mm(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """a (T, F) @ b (N', K').T + bias, of which the first `out_features` columns are, in bfloat16."""
    a, b = _in_lines(a), _in_lines(b)
    if not fills(a.shape[0], out_features) and _is_torchs(a, a_scales, b, bias):
        across = torch.nn.functional.pad(b_scales, (0, -b_scales.shape[1] % PITCH))
        return torch.nn.functional.scaled_mm(
            a,
            b[:out_features].t(),
            a_scales,
            ScalingType.BlockWise1x128,
            across.t(),
            ScalingType.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )
    rows = QuantizedRows(a, _by_block(a_scales, PITCH))
    matrix = Matrices(b.unsqueeze(0), b_scales.contiguous().unsqueeze(0))
    out = a.new_empty(a.shape[0], out_features, dtype=torch.bfloat16)
    biases = None if bias is None else bias.contiguous().unsqueeze(0)
    return hopper_fp8_gemm.product(rows, matrix, None, out, biases)


def fills(rows: int, columns: int) -> bool:
    """Whether a product's tiles keep nearly all multiprocessors busy in nearly all of their rounds."""
    tiles = math.ceil(rows / ROWS) * math.ceil(columns / COLUMNS)
    rounds = math.ceil(tiles / MULTIPROCESSORS)
    return rows * columns >= FULL * rounds * MULTIPROCESSORS * ROWS * COLUMNS


def _is_torchs(a: Tensor, a_scales: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Whether PyTorch's product takes it: no padding along K, and rows whose scales lie as it wants them."""
    rows = a.shape[0]
    return bias is None and a.shape[1] == b.shape[1] and rows % 16 == 0 and a_scales.stride() == (1, rows)


def _by_block(scales: Tensor, pitch: int) -> Tensor:
    """Scales (T, blocks) as (blocks, T), contiguous along T, lines at a multiple of `pitch`; a copy if need be."""
    turned = scales.t()
    whole = turned.stride(1) == 1 and turned.stride(0) % pitch == 0 and turned.data_ptr() % (4 * pitch) == 0
    if whole and turned.stride(0) >= turned.shape[1]:
        return turned
    blocks, rows = turned.shape
    made = turned.new_empty(blocks, -(-rows // pitch) * pitch)[:, :rows]
    return made.copy_(turned)


def _blocks(x: Tensor) -> int:
    return blocks_in(x.shape[1], BLOCK)
