"""Quantising on a Hopper GPU: matrices, tokens on their way to rows, and rows on their way to the gradient of matrices.

e4m3, each block with a scale by the rules of `moecompile.runtime.quantize` (DeepSeek-V3, section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moecompile.codegen.instances import PadOffsets, QuantizeGradient, QuantizeRows, QuantizeWeights, TransposeRows
from moecompile.runtime import lines
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.grouped import aligned
from moecompile.runtime.launch import Launch, Value, load
from moecompile.runtime.quantize import BLOCK, E4M3, POWER_OF_TWO, blocks_in, pad

SPLITS = 8
"""Blocks of threads that share a block of rows to transpose: enough for the GPU, few enough to look it up seldom."""


@dataclass(frozen=True)
class QuantizedRows:
    """Rows in e4m3.

    Attributes:
        values: (rows, columns), contiguous.
        scales: (blocks of columns, pitch) float32, of a row and 128 columns; the pitch is a multiple of 4, at least the
            number of rows.
    """

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, like: Tensor, rows: int, columns: int) -> QuantizedRows:
        """Room for so many, on the device of `like`."""
        values = like.new_empty(rows, columns, dtype=E4M3)
        return cls(values, like.new_empty(blocks_in(columns, BLOCK), -(-rows // 4) * 4, dtype=torch.float32))


@dataclass(frozen=True)
class Matrices:
    """The experts' matrices in e4m3, for products that sum over their last dimension.

    Attributes:
        values: (E, N, K), whole blocks, contiguous.
        scales: (E, N / 128, K / 128) float32.
    """

    values: Tensor
    scales: Tensor


def takes_weights(w: Tensor, w_up: Tensor | None) -> bool:
    """Whether `quantize_weights` reads these: 16 bits, whole lines of 16 bytes in each half of a pair."""
    return all(
        matrix.dtype in (torch.bfloat16, torch.float16)
        and matrix.numel() > 0
        and matrix.data_ptr() % 16 == 0
        and aligned(matrix)
        and not any(size % 16 for size in matrix.shape[1:])
        for matrix in (w, w_up)
        if matrix is not None
    )


def quantize_weights(
    w: Tensor, w_up: Tensor | None, gate_up: str, transposed: bool, backward: bool = True,
    scale_format: str = POWER_OF_TWO,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`moecompile::quantize_weights`, in one launch that reads the matrices once.

    Args:
        w: (E, N, K), or (E, K, N) if `transposed`; bfloat16 or float16.
        w_up: the same of the up projection for gate_up="separate", else None.
        gate_up: as of `moecompile.runtime.operators`.
        transposed: the layout of w.
        backward: whether the transposed ones are made, too.
        scale_format: one of SCALE_FORMATS of `moecompile.runtime.quantize`.

    Returns:
        values (E, N', K') e4m3, scales (E, N' / 128, K' / 128) float32, and both transposed, or without elements.
    """
    halves = _halves(w, w_up, gate_up, transposed)
    along_columns = transposed
    if halves[0].stride(2) != 1 and halves[0].stride(1) == 1:
        halves, along_columns = [half.mT for half in halves], not transposed
    interleaved = along_columns and gate_up == "interleaved"
    if not interleaved and (halves[0].stride(2) != 1 or halves[0].stride() != halves[-1].stride()):
        halves = [half.contiguous() for half in halves]
    experts, rows, columns = halves[0].shape
    split = (1, len(halves)) if along_columns else (len(halves), 1)
    all_rows, all_columns = split[0] * pad(rows), split[1] * pad(columns)
    down, across = all_rows // BLOCK, all_columns // BLOCK

    def room(wanted: bool, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        if not wanted:
            return w.new_empty(0, dtype=E4M3), w.new_empty(0, dtype=torch.float32)
        values = w.new_empty(experts, rows * BLOCK, columns * BLOCK, dtype=E4M3)
        return values, w.new_empty(experts, rows, columns, dtype=torch.float32)

    # rows of `same` are features out unless they run along the columns
    same = room(backward or not along_columns, down, across)
    turned = room(backward or along_columns, across, down)
    kernel = load(QuantizeWeights(dtype_name(w.dtype), interleaved, scale_format), w.device.index)
    first, second = halves[0], halves[0] if interleaved else halves[-1]
    written = [each if each.numel() else None for each in (*same, *turned)]
    stride = first.stride(0) if experts > 1 else 0  # one matrix may have more numbers than 32 bits count
    values: tuple[Value, ...] = (first, second, *written, stride, first.stride(1), rows, columns, *split)
    Launch(kernel, experts * down * across, values).run()
    return (*turned, *same) if along_columns else (*same, *turned)


def _halves(w: Tensor, w_up: Tensor | None, gate_up: str, transposed: bool) -> list[Tensor]:
    """Gate and up projection, or the one matrix, as views (E, N, K) or (E, K, N)."""
    axis = 2 if transposed else 1
    if gate_up == "halves":
        return list(w.chunk(2, axis))
    if gate_up == "interleaved":
        return [w[:, :, 0::2], w[:, :, 1::2]] if transposed else [w[:, 0::2], w[:, 1::2]]
    return [w] if w_up is None else [w, w_up]


def quantize_rows(
    x: Tensor, slots: Tensor | None, rows: QuantizedRows | None, tokens: tuple[Tensor, Tensor] | None,
    scale_format: str = POWER_OF_TWO,
) -> None:  # fmt: skip
    """rows[slots[t, k], :] = x[t, :] for every k, quantised 1 x 128; and the tokens themselves.

    Args:
        x: (T, H), bfloat16 or float16, contiguous; H is a multiple of 16.
        slots: (T, K) int32, contiguous; nothing is written where it is -1. None if tokens are rows.
        rows: (R, H), written; None if nobody wants them.
        tokens: values (T, H) e4m3 and scales (T, ceil(H / 128)) float32, written, lines contiguous; None if nobody
            wants them.
        scale_format: one of SCALE_FORMATS of `moecompile.runtime.quantize`.
    """
    kernel = load(QuantizeRows(dtype_name(x.dtype), scale_format), x.device.index)
    values, scales = tokens or (None, None)
    row_values, row_scales = (rows.values, rows.scales) if rows else (None, None)
    pitch = row_scales.shape[1] if row_scales is not None else 0
    warps = x.shape[0] * -(-x.shape[1] // 1024)
    blocks = max(1, min(-(-warps * 32 // kernel.threads), 32 * kernel.multiprocessors))
    lines = (0, 0) if tokens is None else (tokens[0].stride(0), tokens[1].stride(0))
    sizes = (x.shape[0], 1 if slots is None else slots.shape[1], x.shape[1], pitch, *lines)
    Launch(kernel, blocks, (x, slots, row_values, row_scales, values, scales, *sizes)).run()


def quantize_lines(x: Tensor, scale_format: str = POWER_OF_TWO) -> Tensor:
    """Rows quantised 1 x 128, each with its scales behind it: bytes (T, H + 4 ceil(H / 128)), in whole pieces of 16.

    Args:
        x: (T, H), bfloat16 or float16, contiguous; H is a multiple of 16.
        scale_format: one of SCALE_FORMATS of `moecompile.runtime.quantize`.
    """
    count, columns = x.shape
    made = x.new_empty((count, 2 * lines.width(columns)), dtype=torch.uint8)
    quantize_rows(x, None, None, lines.parts(made, columns), scale_format)
    return made


def quantize_gradient(x: Tensor, scale_format: str = POWER_OF_TWO) -> tuple[QuantizedRows, QuantizedRows]:
    """The rows of x quantised 1 x 128, and these as columns, with a scale for each column and 128 rows.

    Args:
        x: (T, N), bfloat16 or float16, contiguous; N is a multiple of 16 and T at least 1.
        scale_format: of the rows' scales; the columns' are powers of two.

    Returns:
        values (T, N), scales (ceil(N / 128), T); and values (N, P), for P rows in whole blocks of 128, those beyond T
        zero, with scales (P / 128, N).
    """
    (count, columns), row_blocks = x.shape, blocks_in(x.shape[0], BLOCK)

    def room(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    rows = QuantizedRows(x.new_empty(x.shape, dtype=E4M3), room(blocks_in(columns, BLOCK), count))
    turned = QuantizedRows(x.new_empty(columns, row_blocks * BLOCK, dtype=E4M3), room(row_blocks, columns))
    kernel = load(QuantizeGradient(dtype_name(x.dtype), scale_format), x.device.index)
    written = (rows.values, rows.scales, turned.values, turned.scales)
    Launch(kernel, row_blocks * rows.scales.shape[0], (x, *written, count, columns, row_blocks)).run()
    return rows, turned


def pad_offsets(offsets: Tensor) -> Tensor:
    """The end of each expert's rows (E,) int32 where they are filled up to whole blocks of 128."""
    ends = torch.empty_like(offsets)
    kernel = load(PadOffsets(), offsets.device.index)
    Launch(kernel, 1, (offsets, ends, offsets.shape[0])).run()
    return ends


def transpose_rows(
    values: Tensor,
    scales: Tensor,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
    ends: Tensor | None = None,
    *,
    top_k: int | None = None,
    per_column: bool,
    features: int | None = None,
    interleaved: bool = False,
    scale_format: str = POWER_OF_TWO,
) -> QuantizedRows:
    """Rows in expert order as columns, each expert's filled up with zeros to whole blocks.

    Args:
        values: (R, F) e4m3, or the tokens (T, F), lines contiguous; F is a multiple of 16.
        scales: of 1 x 128: (blocks, pitch) of rows, (T, blocks) of tokens.
        order: (R,) int32, the assignment of a row; None if rows are in their place.
        offsets: (E,) int32; None if one expert has all rows.
        ends: of `pad_offsets`; likewise.
        top_k: experts of a token, where `values` are tokens; None where they are rows.
        per_column: whether each column gets a scale of its own for 128 rows (gradients) or 128 columns share it.
        features: of each half where the columns are one or two halves padded to whole blocks; None if there is nothing
            to leave out.
        interleaved: whether the two halves' features come by turns in the result.
        scale_format: of `scales`; new ones are powers of two.

    Returns:
        values (F, P), without what pads F, for the P rows that all experts may fill, those beyond the last end not
        written; scales (P / 128, F), or (ceil(F / 128), P / 128) if not `per_column`.
    """
    columns, experts = values.shape[1], 1 if offsets is None else offsets.shape[0]
    rows = values.shape[0] if order is None else order.shape[0]
    row_blocks = max(1, (rows + (BLOCK - 1) * experts) // BLOCK)
    half, kept = (columns, columns) if features is None else (pad(features), features)
    lines = columns // half * kept
    step, second = (2, 1) if interleaved else (1, kept)
    out = values.new_empty(lines, row_blocks * BLOCK)
    size = (row_blocks, lines) if per_column else (blocks_in(columns, BLOCK), row_blocks)
    out_scales = scales.new_empty(size)
    kernel = load(transposing_instance(top_k is not None, per_column, scale_format), values.device.index)
    strides = (scales.stride(0), 1) if top_k is not None else (1, scales.stride(0))
    arguments = (
        values, scales, order, offsets, ends, out, out_scales, *strides,
        experts, rows, top_k or 1, columns, values.stride(0), row_blocks, out_scales.shape[1], half, kept, step, second,
    )  # fmt: skip
    Launch(kernel, row_blocks * min(SPLITS, blocks_in(columns, BLOCK)), arguments).run()
    return QuantizedRows(out, out_scales)


def transposing_instance(gathered: bool, per_column: bool, scale_format: str) -> TransposeRows:
    """The kernel of `transpose_rows`; gathered: whether the values are tokens."""
    return TransposeRows(gathered, per_column, POWER_OF_TWO if per_column else scale_format)
