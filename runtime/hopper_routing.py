"""Routing on a Hopper GPU: the plan, tokens to rows in expert order, and rows and their values back to tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moecompile.codegen.instances import IDS, PLAN_EXPERTS, Collect, Combine, Dispatch, Plan
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.launch import Launch, Value, load

PLAN_BLOCKS = 128
"""Blocks that make a plan, at most: each adds up the counts of all before it."""

COUNTED = 64
"""Rows that a GEMM which dispatches them counts together (`BLOCK` of codegen/kernels/feed.cuh)."""
BESIDE = 16 * 2**20
"""Bytes of rows from which on the GEMM that reads them dispatches them itself: fewer are soon there."""


def takes_plan(num_experts: int) -> bool:
    """Whether the kernels make plans for that many experts."""
    return num_experts <= PLAN_EXPERTS[-1]


def plan(
    expert_ids: Tensor, num_experts: int, room: int | None = None, *, first: int = 0, among: int | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Counts, offsets, slots and order of `moecompile::plan`, in one launch or two.

    Args:
        expert_ids: (T, K) of any integer dtype; -1 for an assignment without an expert. Any other id outside
            [0, among) is a device-side assertion.
        num_experts: at most the last of PLAN_EXPERTS.
        room: for so many rows; None for all assignments.
        first: of these experts among all that the ids speak of. Assignments to others have no row.
        among: how many those are; `num_experts` if None.
        slots: (T, K) int32, contiguous, which is to be written; made if None.
    """
    ids = conformed(expert_ids)
    chosen = dtype_name(ids.dtype), next(room for room in PLAN_EXPERTS if num_experts <= room)
    place = load(Plan("place", *chosen), ids.device.index)
    assignments = ids.numel()
    blocks = min(max(1, -(-assignments // place.threads)), PLAN_BLOCKS)

    def empty(*size: int) -> Tensor:
        return ids.new_empty(size, dtype=torch.int32)

    block_counts, of = None, (assignments, num_experts, first, num_experts if among is None else among)
    if blocks > 1:
        block_counts, count = empty(blocks, num_experts), load(Plan("count", *chosen), ids.device.index)
        Launch(count, blocks, (ids, block_counts, *of)).run()
    rows = assignments if room is None else min(room, assignments)
    counts, offsets, order = empty(num_experts), empty(num_experts), empty(rows)
    slots = empty(*ids.shape) if slots is None else slots
    Launch(place, blocks, (ids, block_counts, counts, offsets, slots, order, *of, rows)).run()
    return counts, offsets, slots, order


def conformed(expert_ids: Tensor) -> Tensor:
    """The ids as the kernels read them."""
    ids = expert_ids.contiguous()
    return ids if dtype_name(ids.dtype) in IDS else ids.to(torch.int64)


def dispatch(x: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """rows[slots[t, k], :] = x[t, :] for every k.

    Args:
        x: (T, H), a row after the other, each contiguous and, with what lies between, a multiple of 16 bytes.
        slots: (T, K) int32, contiguous; nothing is written where it is -1.
        rows: (R, H) of x's dtype, contiguous.

    Returns:
        rows.
    """
    kernel = load(Dispatch(), rows.device.index)
    pieces, pitch = (size * x.element_size() // 16 for size in (x.shape[1], x.stride(0)))
    warps = x.shape[0] * -(-pieces // 128)
    blocks = min(-(-warps * 32 // kernel.threads), 32 * kernel.multiprocessors)
    Launch(kernel, blocks, (x, slots, rows, *slots.shape, pieces, pitch)).run()
    return rows


def is_beside(rows: int, columns: int, item: int) -> bool:
    """Whether a GEMM dispatches that many rows of tokens, of elements of `item` bytes, itself.

    It counts the rows' pieces of 16 bytes in 32 bits.
    """
    return BESIDE <= rows * columns * item and can_be_beside(rows, columns, item)


def can_be_beside(rows: int, columns: int, item: int) -> bool:
    """Whether it could."""
    return rows * columns * item < 16 << 32


def words_of_progress(rows: int) -> int:
    """What a GEMM that dispatches so many rows counts in."""
    return 1 + -(-rows // COUNTED)


@dataclass(frozen=True)
class Dispatching:
    """Tokens whose rows a grouped GEMM dispatches itself, while it multiplies (codegen/kernels/feed.cuh).

    Attributes:
        source: `Source::Arguments` of the kernel: where the tokens are.
        order: (R,) int32, the assignment of a row.
        top_k: assignments of a token.
        progress: int32, zeros when the kernel begins, which counts the rows taken, and of each COUNTED those written.
        records: whether the tokens are `Records`: lines, some of which may have come from other ranks.
    """

    source: tuple[Value, ...]
    order: Tensor
    top_k: int
    progress: Tensor
    records: bool = False

    @classmethod
    def of(cls, x: Tensor, scales: Tensor | None, order: Tensor, top_k: int) -> Dispatching:
        """Those of a tensor (T, K), contiguous, and of its scales (T, ceil(K / 128)) float32 if it is in e4m3.

        Both may be parts of lines (`moecompile.runtime.lines`). What the kernel counts in is made and cleared.
        """
        progress = order.new_zeros(words_of_progress(order.shape[0]))
        if scales is None or x.is_contiguous():
            return cls((x, scales), order, top_k, progress)
        behind = 4 * scales.storage_offset() - x.storage_offset()
        line = (x, None, None, 0, 0, x.stride(0) // 16, 0, behind // 16, 0)
        return cls(line, order, top_k, progress, records=True)

    def values(self, rows: Tensor, scales: Tensor | None) -> tuple[Value, ...]:
        """What the kernel is told, which writes `rows` (R, K) and their scales (scale blocks, pitch)."""
        pieces = rows.shape[1] * rows.element_size() // 16
        blocks, pitch = (scales.shape[0], scales.stride(0)) if scales is not None else (0, 0)
        if rows.shape[0] * pieces >= 1 << 32:
            raise ValueError(f"rows {tuple(rows.shape)} are too many to be counted in 32 bits: dispatch them before")
        return (*self.source, rows, scales, self.order, self.progress, self.top_k, pieces, blocks, pitch)


def combine(rows: Tensor, slots: Tensor, weights: Tensor | None, output: str, out: Tensor) -> Tensor:
    """out[t, :] = sum over k of output(rows[slots[t, k], :], weights[t, k]), in float32, rounded once.

    Args:
        rows: (R, H), bfloat16 or float16, contiguous; H is a multiple of 8.
        slots: (T, K) int32, contiguous; nothing is added where it is -1.
        weights: (T, K) float32, contiguous, or None.
        output: an expression of `out` and `weight`.
        out: (T, H), bfloat16, float16 or float32, contiguous.

    Returns:
        out.
    """
    given, wanted = (dtype_name(tensor.dtype) for tensor in (rows, out))
    kernel = load(Combine(given, wanted, output), out.device.index)
    blocks = min(-(-out.numel() // (8 * kernel.threads)), 16 * kernel.multiprocessors)
    Launch(kernel, blocks, (rows, slots, weights, out, *slots.shape, out.shape[1])).run()
    return out


def collect(parts: Tensor, more: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of rows back to assignments: sum over p of parts[p, slots[t, k]], plus more[slots[t, k]], rounded once.

    Args:
        parts: (P, R) float32, contiguous.
        more: (R,) float32, contiguous, or None.
        slots: (T, K) int32, contiguous; zero where it is -1.
        dtype: of the result: bfloat16, float16 or float32.

    Returns:
        (T, K).
    """
    out, kernel = parts.new_empty(slots.shape, dtype=dtype), load(Collect(dtype_name(dtype)), parts.device.index)
    blocks = max(1, min(-(-slots.numel() // kernel.threads), 16 * kernel.multiprocessors))
    Launch(kernel, blocks, (parts, more, slots, out, *parts.shape, slots.numel())).run()
    return out
