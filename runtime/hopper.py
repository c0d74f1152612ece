"""The grouped GEMMs of `codegen/kernels` on torch tensors: which tile, which arguments, which grid."""

from __future__ import annotations

import functools
import logging
import struct
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moecompile.codegen import nvrtc
from moecompile.codegen.gemms import Added, GroupedGemm
from moecompile.runtime.hopper_routing import Dispatching
from moecompile.runtime.hopper_tiles import (
    BOX_ROWS,
    ROWS,
    Projection,
    activated_instance,
    backward_instance,
    choose,
    is_transposed,
    with_bias,
)
from moecompile.runtime.launch import Launch, Mapped, Value, boxes_of, load

log = logging.getLogger("moecompile")

LINE = 128  # bytes of a tile's line that pass at once
ACROSS = 64  # columns of a line that runs across K
OUT_BOX = (16, 64)  # of a result, written at once
ADDED_BOX, ADDED_TURNED_BOX = (1, 16, 32), (1, 32, 16)  # of float32 that are added at once


@functools.cache
def usable(device: int) -> bool:
    """Whether the kernels run on the device of that index; if not, the log says so, once."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        name = torch.cuda.get_device_name(device)
        log.info("experts on %s run PyTorch's grouped GEMM: moecompile's kernels are for Hopper GPUs (sm_90)", name)
        return False
    try:
        nvrtc.version()
    except nvrtc.CompilerMissing as error:
        log.warning("experts run PyTorch's grouped GEMM: %s", error)
        return False
    return True


def serves(device: torch.device) -> bool:
    """Whether the kernels run on that device."""
    return device.type == "cuda" and usable(device.index)


@dataclass(frozen=True)
class Taking:
    """How blocks take tiles when they are free (codegen/kernels/tickets.cuh).

    Attributes:
        taken: one int32, zero when the kernel begins.
        multiple: of each expert's rows only so many times that many are computed, the first ones; 0 for all.
    """

    taken: Tensor
    multiple: int = 0


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    instance: GroupedGemm | None = None,
    early: bool = False,
    taking: Taking | None = None,
) -> Tensor:
    """out[r, :] = a[r, :] @ b[e(r)] + bias[e(r)], where expert e has the rows from offsets[e - 1] to offsets[e].

    Args:
        a: (rows, K), bfloat16, float16 or float8_e4m3fn; its last dimension is contiguous.
        b: (E, K, N) of the same dtype; of its last two dimensions one is contiguous (K for float8_e4m3fn).
        offsets: (E,) int32, on the device.
        out: (rows, N), contiguous; float8 inputs give bfloat16. Rows beyond offsets[-1] are left as they are.
        bias: (E, N) of a's dtype, contiguous, or None.
        a_scales: (rows, ceil(K / 128)) float32, transposed in memory: strides (1, a multiple of 4).
        b_scales: (E, ceil(N / 128), ceil(K / 128)) float32, contiguous.
        instance: the kernel; chosen by the sizes if None.
        early: whether the launch before this one writes neither offsets nor matrices, so that they are read meanwhile:
            what wrote them is done, since that launch has waited for it (`let_next_grid_begin` of kernels/ptx.cuh).
        taking: how blocks take tiles; None if each has its own.

    Returns:
        out.
    """
    (rows, k), (experts, _, n) = a.shape, b.shape
    chosen = instance or choose(a.dtype, rows, experts, n, k, is_transposed(b))
    chosen = with_bias(chosen, bias is not None)
    scales = _mapped(a_scales, (1, ROWS + 4), turned=True) if a_scales is not None else None
    written = (_written(out), bias)
    _launch(chosen, a, (b,), offsets, (experts, k, n), written, scales, b_scales, early=early, taking=taking)
    return out


def activated_gemm(
    a: Tensor,
    projection: Projection,
    activation: str,
    offsets: Tensor,
    out: Tensor,
    *,
    hidden: Tensor | None = None,
    weights: Tensor | None = None,
    order: Tensor | None = None,
    dispatching: Dispatching | None = None,
    early: bool = False,
    taking: Taking | None = None,
) -> None:
    """out = activation(a @ matrices + biases), each row with its expert's; `hidden` gets the rows.

    Args:
        a: (rows, K), bfloat16 or float16, contiguous.
        projection: GEMM1.
        activation: an expression of `gate` and `up`, or of `hidden`, and of `weight`.
        offsets: (E,) int32, on the device.
        out: (rows, I) of a's dtype, contiguous.
        hidden: (rows, N), or (rows, 2 I) where there are two matrices, contiguous; None if nobody needs them.
        weights: (assignments,) float32, where the activation reads `weight`.
        order: (rows,) int32, the assignment of a row; goes with `weights`.
        dispatching: the tokens whose rows `a` is to be filled with; None if they are there.
        early: as of `grouped_gemm`.
        taking: likewise.
    """
    (rows, k), (experts, _, n) = a.shape, projection.matrices[0].shape
    chosen = activated_instance(a.dtype, rows, projection, activation, hidden is not None)
    parts = projection.parts(hidden) if hidden is not None else ()
    # where nothing is saved, the kernel takes only the number of columns from these
    targets: list[Value] = [_written(part) for part in parts] or [_columns(n)]
    biases = projection.biases or ()
    _launch(
        chosen, a, projection.matrices, offsets, (experts, k, n),
        (_written(out), targets[0], targets[-1], *_pair(biases), weights, order), dispatching=dispatching, early=early,
        taking=taking,
    )  # fmt: skip


def activation_backward(
    of_out: Tensor,
    w_out: Tensor,
    projection: Projection,
    activation: str,
    offsets: Tensor,
    hidden: Tensor,
    order: Tensor,
    *,
    weights: Tensor | None,
    scales: Tensor | None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Back through GEMM2 and the activation.

    Args:
        of_out: (rows, H2), the gradient of GEMM2's rows before the output's weight scales it; contiguous.
        w_out: (E, I, H2); of its last two dimensions one is contiguous.
        projection: GEMM1, which says how `hidden` is laid out.
        activation: as of `activated_gemm`.
        offsets: (E,) int32.
        hidden: (rows, N), GEMM1's rows.
        order: (rows,) int32, the assignment of a row.
        weights: (assignments,) float32, what the activation reads as `weight`; None if it does not.
        scales: (assignments,) float32, what the output multiplies by; None for 1.
        in_place: whether the gradient of `hidden` is written over it: who writes a part has read it, nobody else does.

    Returns:
        the gradient of `hidden` (rows, N); the activation times the scale (rows, I); the gradient of the routing weight
        in parts (parts, rows) float32, None where there is neither weight nor scale.
    """
    (rows, k), (experts, inner, _) = of_out.shape, w_out.shape
    weighted = weights is not None or scales is not None
    instance = backward_instance(of_out.dtype, rows, w_out, projection.gate_up, activation, scales is not None)
    of_hidden, scaled = hidden if in_place else torch.empty_like(hidden), hidden.new_empty(rows, inner)
    tiles = (inner + instance.columns - 1) // instance.columns
    of_weight = hidden.new_empty(tiles, rows, dtype=torch.float32) if weighted else None
    parts, gradients = projection.parts(hidden), projection.parts(of_hidden)
    _launch(
        instance, of_out, (w_out.mT,), offsets, (experts, k, inner),
        (
            _mapped(parts[0], OUT_BOX), _mapped(parts[-1], OUT_BOX), _written(gradients[0]), _written(gradients[-1]),
            _written(scaled), of_weight, weights, scales, order, rows,
        ),
    )  # fmt: skip
    return of_hidden, scaled, of_weight


def grouped_outer(
    a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, *, instance: GroupedGemm | None = None, mean_over: int = 1,
    taking: Taking | None = None,
) -> Tensor:  # fmt: skip
    """out[e] = a[rows of e].T @ b[rows of e] / mean_over, where expert e has rows offsets[e - 1] to offsets[e].

    In float32 the products are added to what `out` holds.

    Args:
        a: (rows, M), bfloat16 or float16; its last dimension is contiguous.
        b: (rows, N) of the same dtype; its last dimension is contiguous. Rows beyond offsets[-1] may hold anything.
        offsets: (E,) int32, on the device.
        out: (E, M, N) in a's dtype or in float32, contiguous but for columns that may lie between its lines.
            Without rows an expert's is zeros, or, in float32, as it was.
        instance: the kernel; chosen by the sizes if None.
        mean_over: what float32 sums are divided by, as a product, before they are rounded.
        taking: as of `grouped_gemm`, of all rows.

    Returns:
        out.
    """
    (rows, m), n, experts = a.shape, b.shape[1], offsets.shape[0]
    chosen = instance or choose(a.dtype, m, experts, n, rows, transposed=True, over_rows=True)
    written: tuple[Value, ...]
    if out.dtype == torch.float32:
        chosen, written = replace(chosen, epilogue=Added()), added(out)
    else:
        written = (_written(out.flatten(0, 1)), None)
    _launch(chosen, a, (b.unsqueeze(0),), offsets, (experts, m, n), written, mean_over=mean_over, taking=taking)
    return out


def added(out: Tensor, turned: bool = False) -> tuple[Value, ...]:
    """`Arguments` of the kernels' `Added`, for float32 (E, M, N), or if `turned` (E, N, M) for its transpose's sums.

    Raises:
        ValueError: bulk copies cannot reach it.
    """
    if out.stride(2) != 1 or out.data_ptr() % 16 or any(stride % 4 for stride in out.stride()[:2]):
        words = f"strides {out.stride()} at {out.data_ptr():#x}"
        raise ValueError(f"what is added to must lie in whole lines of 16 bytes along its last dimension, got {words}")
    return _mapped(out, ADDED_TURNED_BOX if turned else ADDED_BOX), out.shape[1 if turned else 2]


def _mapped(tensor: Tensor, box: tuple[int, ...], *, turned: bool = False) -> Mapped:
    """The tensor, or with `turned` its transpose, for bulk copies of such boxes."""
    seen = tensor.mT if turned else tensor
    return Mapped(tensor, boxes_of(seen.dtype, tuple(seen.shape), seen.stride(), box))


def _written(out: Tensor) -> Mapped:
    """The tensor as a `Target` of kernels/box.cuh."""
    return Mapped(out, boxes_of(out.dtype, tuple(out.shape), out.stride(), OUT_BOX, target=True))


def _columns(count: int) -> bytes:
    """A `Target` that nothing is written to."""
    return (bytes(128) + struct.pack("<Qii", 0, count, 0)).ljust(192, b"\0")


def _pair(biases: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    return (biases[0], biases[-1]) if biases else (None, None)


def _launch(
    instance: GroupedGemm,
    a: Tensor,
    matrices: tuple[Tensor, ...],
    offsets: Tensor | None,
    sizes: tuple[int, int, int],
    epilogue: tuple[Value, ...],
    scales: Mapped | None = None,
    b_scales: Tensor | None = None,
    b_scale_pair: int = 0,
    dispatching: Dispatching | None = None,
    early: bool = False,
    taking: Taking | None = None,
    mean_over: int = 1,
) -> None:
    """Launches the kernel; of the instance it is left to the arguments how rows come, and tiles.

    `sizes` are the experts, the columns of a and those of the schedule. b_scales are (E, blocks of N, blocks of K); a
    second matrix begins `b_scale_pair` blocks after the first.
    """
    feed: tuple[Value, ...] = (a.shape[0] if instance.whole else 0,)
    if dispatching is not None:
        feed = dispatching.values(a, None if scales is None else scales.tensor)
        instance = replace(instance, dispatches=True, records=dispatching.records)
    if taking is not None:
        instance = replace(instance, taken=True)
    multiple, taken = (0, None) if taking is None else (taking.multiple, taking.taken)
    columns = LINE // a.element_size()
    loaded = instance.columns // max(instance.cluster, len(matrices))  # `BOX` of kernels/grouped_gemm.cuh
    boxes = [
        _mapped(b, (1, columns, ACROSS)) if instance.transposed else _mapped(b, (1, loaded, columns), turned=True)
        for b in matrices
    ]
    kernel = load(instance, a.device.index)
    box = (columns, BOX_ROWS) if instance.over_rows and instance.transposed else (BOX_ROWS, columns)
    along = _mapped(a, (instance.overhang // instance.cluster, columns)) if instance.overhang else bytes(128)
    maps = (_mapped(a, box), boxes[0], boxes[-1], along)
    grid = tuple(b_scales.shape[1:]) if b_scales is not None else (0, 0)
    blocks = kernel.multiprocessors // instance.cluster * instance.cluster
    more = (*sizes, *grid, b_scale_pair, int(early), multiple, 1 / mean_over, taken, *feed, *epilogue)
    Launch(kernel, blocks, (*maps, scales or bytes(128), offsets, b_scales, *more)).run()
