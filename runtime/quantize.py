"""Fine-grained quantisation to FP8 (e4m3), in readable torch: what every kernel has to agree with bit for bit.

The recipe is that of DeepSeek-V3 (technical report, section 3.3.2): activations and gradients have one scale for 1x128
values, weights one for 128x128. A block of values v, computed in float32, becomes

    scale = 2^k, k >= -126 the smallest with amax / 2^k <= 448, the largest e4m3 number; amax = largest |v| but NaN
    q     = e4m3(v / scale), to the nearest, ties to even

so that no value saturates, a block of zeros has scale 2^-126, and v / scale is exact before it is rounded. What is not
finite stays visible: NaN becomes NaN; a block with an infinity has scale inf, and each of its values is NaN once
dequantised. Because scales are powers of two, changing them (`to_square_blocks`, `requantize_along_tokens`) loses no
bits but those that fall below e4m3's smallest number. In the other format, "float32",

    scale = max(amax / 448, 2^-126)         q = e4m3(v * (1 / scale)), each operation rounded to float32

and to change scales rounds once more. Changed ones are powers of two always: gradients of matrices read no others.

A block is the (rows, columns) of the last two dimensions that share a scale. The last block of either dimension may be
partial; missing values count as zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
BLOCK = 128
Block = tuple[int, int]
ALONG_FEATURES: Block = (1, BLOCK)
ALONG_TOKENS: Block = (BLOCK, 1)
SQUARE: Block = (BLOCK, BLOCK)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What `quantize` takes: float32 holds all of it exactly."""

POWER_OF_TWO = "power_of_two"
FLOAT32 = "float32"
SCALE_FORMATS = (POWER_OF_TWO, FLOAT32)
"""Of the scales of what forward products and the gradients of rows multiply."""

LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126
MANTISSA_BITS = 23  # of float32
MANTISSA = (1 << MANTISSA_BITS) - 1
MANTISSA_OF_448 = 0x600000  # 448 = 1.75 * 2^8
EXPONENT_OF_448 = 8
INFINITE = 255  # exponent field of float32


def pad(size: int) -> int:
    """The size rounded up to a multiple of 128."""
    return blocks_in(size, BLOCK) * BLOCK


def blocks_in(size: int, length: int) -> int:
    """How many blocks of that length hold `size` values, the last one perhaps in part."""
    return (size + length - 1) // length


def quantize(values: Tensor, block: Block, scale_format: str = POWER_OF_TWO) -> tuple[Tensor, Tensor]:
    """Quantises blocks of the last two dimensions.

    Args:
        values: (..., R, F), bfloat16, float16 or float32, any strides.
        block: rows and columns of a block.
        scale_format: one of SCALE_FORMATS.

    Returns:
        e4m3 values (..., R, F) and float32 scales (..., ceil(R / rows), ceil(F / columns)), both contiguous.

    Raises:
        TypeError: values of another dtype.
    """
    if values.dtype not in DTYPES:
        words = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"quantize takes values of {words}; got {values.dtype}, cast them first")
    blocks = _cut(values.to(torch.float32), block)
    amax = torch.where(blocks.isnan(), 0, blocks.abs()).amax((-3, -1))
    scales, inverses = _powers_of_two(amax) if scale_format == POWER_OF_TWO else _shares_of_largest(amax)
    return _joined(_to_e4m3(blocks * _spread(inverses)), values), scales


def dequantize(values: Tensor, scales: Tensor, block: Block) -> Tensor:
    """The float32 numbers (..., R, F) that e4m3 values (..., R, F) and the scales of their blocks stand for."""
    return _joined(_cut(values.to(torch.float32), block) * _spread(scales), values)


def to_square_blocks(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts values with a scale for 1x128 to one scale for 128x128: the largest of each block's, or the power above.

    This is the second operand of a weight's gradient, whose GEMM runs along tokens (the scaling-aware transpose of
    FP8-Flow-MoE).

    Args:
        values: (..., R, F) e4m3.
        scales: (..., R, ceil(F / 128)) float32.

    Returns:
        e4m3 values (..., R, F) and float32 scales (..., ceil(R / 128), ceil(F / 128)), powers of two.
    """
    largest = power_above(_cut(scales, ALONG_TOKENS).amax((-3, -1)))
    ratios = _joined(_cut(scales, ALONG_TOKENS) / _spread(largest), scales)
    shifted = _cut(values.to(torch.float32), ALONG_FEATURES) * _spread(ratios)
    return _joined(_to_e4m3(shifted), values), largest


def requantize_along_tokens(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises values with a scale for 1x128 once more, with a scale for 128x1: 128 tokens of a feature.

    This is the first operand of a weight's gradient.

    Args:
        values: (..., R, F) e4m3.
        scales: (..., R, ceil(F / 128)) float32.

    Returns:
        e4m3 values (..., R, F) and float32 scales (..., ceil(R / 128), F), powers of two.
    """
    return quantize(dequantize(values, scales, ALONG_FEATURES), ALONG_TOKENS)


def quantize_weights(
    w: Tensor, w_up: Tensor | None, gate_up: str, transposed: bool, backward: bool = True,
    scale_format: str = POWER_OF_TWO,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Experts' weights in blocks of 128x128, and their transposed copy: `moecompile::quantize_weights`.

    Blocks restart at each expert, and at gate and at up. FP8 products contract along contiguous memory only, so that
    forward and backward need a copy each; the scales of both are the same.

    Args:
        w: (E, N, K), or (E, K, N) if transposed; bfloat16, float16 or float32.
        w_up: the up projection for gate_up="separate", shaped as w.
        gate_up: where gate and up lie in N, as in `moecompile.runtime.operators`.
        transposed: whether the layout is (E, K, N).
        backward: whether the transposed copy is made, which nobody else reads.
        scale_format: one of SCALE_FORMATS.

    Returns:
        values (E, N', K'), scales (E, N' / 128, K' / 128), values transposed (E, K', N') and their scales, or two
        tensors without elements; N' is `padded_width`, K' = pad(K). What pads is zero.
    """
    matrices = [matrix.mT if transposed else matrix for matrix in (w, w_up) if matrix is not None]
    packed = pack(split_features(matrices, gate_up))
    filled = torch.nn.functional.pad(packed, (0, pad(packed.shape[2]) - packed.shape[2]))
    values, scales = quantize(filled, SQUARE, scale_format)
    if not backward:
        return values, scales, values.new_empty(0), scales.new_empty(0)
    return values, scales, transposed_copy(values), transposed_copy(scales)


def padded_width(inner: int, gate_up: str) -> int:
    """N', the padded number of features of a hidden row, for an inner size I: gate from 0, up from pad(I)."""
    return pad(inner) if gate_up == "single" else 2 * pad(inner)


def split_features(tensors: list[Tensor], gate_up: str) -> list[Tensor]:
    """Gate and up, or all there is, of tensors whose dimension 1 is hidden features: matrices, biases, rows."""
    match gate_up:
        case "halves":
            return list(tensors[0].chunk(2, 1))
        case "interleaved":
            return [tensors[0][:, 0::2], tensors[0][:, 1::2]]
        case _:
            return tensors


def pack(parts: list[Tensor]) -> Tensor:
    """Parts (n, I, ...) side by side along dimension 1, each filled with zeros to pad(I)."""
    filled = []
    for part in parts:
        behind = part.new_zeros(part.shape[0], pad(part.shape[1]) - part.shape[1], *part.shape[2:])
        filled += [part, behind]
    return torch.cat(filled, 1)


def unpack(packed: Tensor, inner: int) -> list[Tensor]:
    """Views of the parts (n, I) in packed rows (n, N')."""
    return [part[:, :inner] for part in packed.split(pad(inner), 1)]


def transposed_copy(matrices: Tensor) -> Tensor:
    """A copy that is contiguous, and a copy even where the transposed view is contiguous itself."""
    return matrices.mT.clone(memory_format=torch.contiguous_format)


def power_above(scales: Tensor) -> Tensor:
    """The smallest powers of two that are not below these; infinite where they are."""
    bits = scales.contiguous().view(torch.int32)
    return ((bits + MANTISSA) >> MANTISSA_BITS << MANTISSA_BITS).view(torch.float32)


def _shares_of_largest(amax: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and its inverse, both rounded, for the largest magnitudes of blocks."""
    # by a tensor: on a GPU PyTorch multiplies by the inverse of a number, which rounds otherwise
    scales = (amax / torch.full_like(amax, LARGEST)).clamp(min=SMALLEST_SCALE)
    return scales, 1 / scales


def _powers_of_two(amax: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and its exact inverse for the largest magnitudes of blocks, from their bits."""
    bits = amax.view(torch.int32)
    above = (bits & MANTISSA) > MANTISSA_OF_448
    exponent = ((bits >> MANTISSA_BITS) - EXPONENT_OF_448 + above.to(torch.int32)).clamp(min=1)
    infinite = amax.isinf()
    scales = torch.where(infinite, INFINITE, exponent) << MANTISSA_BITS
    inverses = torch.where(infinite, 0, 254 - exponent) << MANTISSA_BITS
    return scales.view(torch.float32), inverses.view(torch.float32)


def _to_e4m3(values: Tensor) -> Tensor:
    """Rounded to e4m3; a NaN is 0x7f whatever its sign, as the instruction of the GPU writes it."""
    return values.masked_fill(values.isnan(), torch.nan).to(E4M3)


def _cut(values: Tensor, block: Block) -> Tensor:
    """Values (..., R, F) as blocks (..., R / rows, rows, F / columns, columns), filled with zeros."""
    (rows, columns), (height, width) = values.shape[-2:], block
    down, across = blocks_in(rows, height), blocks_in(columns, width)
    filled = torch.nn.functional.pad(values, (0, across * width - columns, 0, down * height - rows))
    return filled.reshape(*values.shape[:-2], down, height, across, width)


def _joined(blocks: Tensor, like: Tensor) -> Tensor:
    """The values (..., R, F), shaped as `like`, of blocks that `_cut` made."""
    *outer, down, height, across, width = blocks.shape
    rows, columns = like.shape[-2:]
    return blocks.reshape(*outer, down * height, across * width)[..., :rows, :columns].contiguous()


def _spread(scales: Tensor) -> Tensor:
    """Scales (..., down, across) as `_cut`'s blocks multiply by them."""
    return scales.unsqueeze(-1).unsqueeze(-3)
