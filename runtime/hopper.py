"""The grouped GEMMs of `codegen/kernels` on torch tensors: which tile, which arguments, which grid."""

from __future__ import annotations

import functools
import logging
import math
import struct
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moecompile.codegen import nvrtc
from moecompile.codegen.gemms import Activated, ActivationBackward, Added, GroupedGemm, Plain
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.hopper_routing import Dispatching
from moecompile.runtime.launch import Launch, Mapped, Value, boxes_of, load

log = logging.getLogger("moecompile")

ROWS = 128  # of a tile
BOX_ROWS = 64  # of them, that one warpgroup multiplies
LINE = 128  # bytes of a tile's line that pass at once
ACROSS = 64  # columns of a line that runs across K
OUT_BOX = (16, 64)  # of a result, written at once
ADDED_BOX, ADDED_TURNED_BOX = (1, 16, 32), (1, 32, 16)  # of float32 that are added at once
MULTIPROCESSORS = 132
"""Of an H100 or H200 with NVLink; on others tiles are chosen as for these."""
OVERHANG = {3: 64, 4: 32}
"""How many rows beyond a pair of tiles may go along with it: so many as a ring of so many stages leaves room for."""
PAIRS_FROM = 32
"""Rows of an expert, on average, from which blocks go in pairs: some experts then have more than one tile."""
FEW_PAIRS = 4 * ROWS
"""Rows of an expert, on average, up to which it pays that few rows beyond pairs go along (docs/perf.md)."""
NARROW = 0.56
"""What a tile of 128 columns and few rows costs, where one of 256 costs 1 (docs/perf.md)."""


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
class Projection:
    """GEMM1 as the kernels take it.

    Attributes:
        matrices: (E, K, N) each, the second only where gate and up projection are two halves or two tensors; of the
            last two dimensions one is contiguous, the same in both.
        biases: (E, N) for each, contiguous; None if there are none.
        gate_up: as in `moecompile.runtime.operators`.
    """

    matrices: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] | None
    gate_up: str

    def parts(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """The rows of each matrix in hidden rows (R, N), gate first."""
        return hidden.tensor_split(len(self.matrices), 1)


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

    Returns:
        out.
    """
    (rows, k), (experts, _, n) = a.shape, b.shape
    chosen = instance or choose(a.dtype, rows, experts, n, k, is_transposed(b))
    chosen = with_bias(chosen, bias is not None)
    scales = _mapped(a_scales, (1, ROWS + 4), turned=True) if a_scales is not None else None
    _launch(chosen, a, (b,), offsets, (experts, k, n), (_written(out), bias), scales, b_scales, early=early)
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
    """
    (rows, k), (experts, _, n) = a.shape, projection.matrices[0].shape
    chosen = activated_instance(a.dtype, rows, projection, activation, hidden is not None)
    chosen = replace(chosen, dispatches=dispatching is not None)
    parts = projection.parts(hidden) if hidden is not None else ()
    # where nothing is saved, the kernel takes only the number of columns from these
    targets: list[Value] = [_written(part) for part in parts] or [_columns(n)]
    biases = projection.biases or ()
    _launch(
        chosen, a, projection.matrices, offsets, (experts, k, n),
        (_written(out), targets[0], targets[-1], *_pair(biases), weights, order), feed=_feed(dispatching, a),
        early=early,
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


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, *, instance: GroupedGemm | None = None) -> Tensor:
    """out[e] = a[rows of e].T @ b[rows of e], where expert e has the rows from offsets[e - 1] to offsets[e].

    In float32 the products are added to what `out` holds.

    Args:
        a: (rows, M), bfloat16 or float16; its last dimension is contiguous.
        b: (rows, N) of the same dtype; its last dimension is contiguous. Rows beyond offsets[-1] may hold anything.
        offsets: (E,) int32, on the device.
        out: (E, M, N) in a's dtype or in float32, contiguous but for columns that may lie between its lines.
            Without rows an expert's is zeros, or, in float32, as it was.
        instance: the kernel; chosen by the sizes if None.

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
    _launch(chosen, a, (b.unsqueeze(0),), offsets, (experts, m, n), written)
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


def choose(
    dtype: torch.dtype, rows: int, experts: int, n: int, k: int, transposed: bool = False, over_rows: bool = False
) -> GroupedGemm:
    """The kernel for a product of (rows, k), an expert's share of them each, with (k, n).

    With `over_rows`, for each expert's product of (m, its share of k) with (its share of k, n), where m is `rows`.
    """
    name = dtype_name(dtype)
    if dtype == torch.float8_e4m3fn:  # a pair of blocks is faster with few rows, too
        wide = GroupedGemm(name, 256, 4, 2, over_rows=over_rows)
        return wide if n > 128 else replace(wide, columns=128, stages=5, cluster=1)
    if n <= 128 or (not over_rows and _is_sooner_narrow(rows, experts, n)):
        return GroupedGemm(name, 128, 5, 1, transposed, over_rows)
    if over_rows:
        # where sums are long, pairs that load less ahead stay closer together, and find in L2 what others have loaded
        length = k // experts
        if rows < 2 * ROWS:
            return GroupedGemm(name, 256, 4 if length >= 4096 else 3, 1, transposed, over_rows)
        return GroupedGemm(name, 256, 3 if length >= 1024 else 4, 2, transposed, over_rows)
    each = rows // experts
    stages, cluster = 3 if transposed and each < ROWS else 4, 2 if each >= PAIRS_FROM else 1
    along = cluster == 2 and each <= FEW_PAIRS
    return GroupedGemm(name, 256, stages, cluster, transposed, overhang=OVERHANG[stages] if along else 0)


def _is_sooner_narrow(rows: int, experts: int, n: int) -> bool:
    """Whether products of few rows are done sooner in tiles of 128 columns: those of 256 may leave the GPU half idle.

    Of experts chosen at random, E (1 - (1 - 1 / E)^R) have any of R rows.
    """
    if not 0 < rows < BOX_ROWS * experts:
        return False
    used = experts * (1 - (1 - 1 / experts) ** rows)
    narrow, wide = (math.ceil(used * math.ceil(n / columns) / MULTIPROCESSORS) for columns in (128, 256))
    return NARROW * narrow < wide


def activated_instance(
    dtype: torch.dtype, rows: int, projection: Projection, activation: str, save: bool
) -> GroupedGemm:
    """The kernel of `activated_gemm`."""
    experts, k, n = projection.matrices[0].shape
    columns = 256 if save else max(256, n * len(projection.matrices))  # a step's rows are many
    chosen = choose(dtype, rows, experts, columns, k, is_transposed(projection.matrices[0]))
    if save:  # what is saved needs room beside the ring
        chosen = replace(chosen, columns=256, stages=3, overhang=OVERHANG[3] if chosen.overhang else 0)
    if chosen.transposed and len(projection.matrices) == 2:
        chosen = replace(chosen, overhang=0)  # half of the columns of a line across K have no stride
    return replace(chosen, epilogue=Activated(activation, projection.gate_up, save, projection.biases is not None))


def backward_instance(
    dtype: torch.dtype, rows: int, w_out: Tensor, gate_up: str, activation: str, scaled: bool
) -> GroupedGemm:
    """The kernel of `activation_backward`."""
    cluster = 2 if rows // w_out.shape[0] >= ROWS else 1
    epilogue = ActivationBackward(activation, gate_up, scaled)
    return GroupedGemm(dtype_name(dtype), 256, 3, cluster, is_transposed(w_out.mT), epilogue=epilogue)


def with_bias(plain: GroupedGemm, bias: bool) -> GroupedGemm:
    """The kernel that adds a bias, if there is one, to the products."""
    return replace(plain, epilogue=Plain(bias=True)) if bias else plain


def is_transposed(b: Tensor) -> bool:
    """Whether of matrices (E, K, N) it is N that runs along memory."""
    return b.stride(2) == 1 and b.stride(1) != 1


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


def _feed(dispatching: Dispatching | None, rows: Tensor, scales: Tensor | None = None) -> tuple[Value, ...]:
    """`Feed::Arguments` of kernels/feed.cuh."""
    return (0,) if dispatching is None else dispatching.values(rows, scales)


def _launch(
    instance: GroupedGemm,
    a: Tensor,
    matrices: tuple[Tensor, ...],
    offsets: Tensor,
    sizes: tuple[int, int, int],
    epilogue: tuple[Value, ...],
    scales: bytes | Mapped | None = None,
    b_scales: Tensor | None = None,
    b_scale_pair: int = 0,
    feed: tuple[Value, ...] = (0,),
    early: bool = False,
) -> None:
    """Launches the kernel.

    `sizes` are the experts, the columns of a and those of the schedule. b_scales are (E, blocks of N, blocks of K); a
    second matrix begins `b_scale_pair` blocks after the first.
    """
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
    values = (*maps, scales or bytes(128), offsets, b_scales, *sizes, *grid, b_scale_pair, int(early), *feed, *epilogue)
    Launch(kernel, blocks, values).run()
