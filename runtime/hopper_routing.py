"""Routing on a Hopper GPU: the plan, tokens to rows in expert order, and rows back to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.codegen.instances import IDS, PLAN_EXPERTS, Clear, Combine, Dispatch, Plan
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.launch import Launch, load
from moecompile.runtime.remembered import Memory, Remembered, signature

PLAN_BLOCKS = 128
"""Blocks that make a plan, at most: each adds up the counts of all before it."""

BESIDE = 16 * 2**20
"""Bytes of rows from which on the GEMM that reads them dispatches them itself: fewer are soon there."""
PLANS: Memory[Remembered] = Memory()
"""What `plan` launches, by what decides it."""


def takes_plan(num_experts: int) -> bool:
    """Whether the kernels make plans for that many experts."""
    return num_experts <= PLAN_EXPERTS[-1]


def plan(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, offsets, slots and order of `moecompile::plan`, in one launch or two.

    Args:
        expert_ids: (T, K) of any integer dtype; -1 for an assignment without an expert. Any other id outside
            [0, num_experts) is a device-side assertion.
        num_experts: at most the last of PLAN_EXPERTS.
    """
    key = signature((expert_ids,), num_experts)
    known = PLANS.get(key)
    if known is not None:
        counts, offsets, slots, order = known.run((expert_ids,))
        return counts, offsets, slots, order
    ids = _conformed(expert_ids)
    chosen = dtype_name(ids.dtype), next(room for room in PLAN_EXPERTS if num_experts <= room)
    place = load(Plan("place", *chosen), ids.device.index)
    assignments = ids.numel()
    blocks = min(max(1, -(-assignments // place.threads)), PLAN_BLOCKS)

    def empty(*size: int) -> Tensor:
        return ids.new_empty(size, dtype=torch.int32)

    block_counts, launches = None, []
    if blocks > 1:
        block_counts, count = empty(blocks, num_experts), load(Plan("count", *chosen), ids.device.index)
        launches.append(Launch(count, blocks, (ids, block_counts, assignments, num_experts)))
    made = empty(num_experts), empty(num_experts), empty(*ids.shape), empty(assignments)
    counts, offsets, slots, order = made
    values = (ids, block_counts, counts, offsets, slots, order, assignments, num_experts)
    launches.append(Launch(place, blocks, values))
    for launch in launches:
        launch.run()
    scratch = () if block_counts is None else (block_counts,)
    PLANS.put(key, Remembered((expert_ids,), {0: _conformed}, (ids,), (), scratch, made, launches))
    return counts, offsets, slots, order


def _conformed(expert_ids: Tensor) -> Tensor:
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
    dispatch_launch(x, slots, rows).run()
    return rows


def dispatch_launch(x: Tensor, slots: Tensor, rows: Tensor) -> Launch:
    """What `dispatch` launches."""
    kernel = load(Dispatch(), rows.device.index)
    pieces, pitch = (size * x.element_size() // 16 for size in (x.shape[1], x.stride(0)))
    warps = x.shape[0] * -(-pieces // 128)
    blocks = min(-(-warps * 32 // kernel.threads), 32 * kernel.multiprocessors)
    return Launch(kernel, blocks, (x, slots, rows, *slots.shape, pieces, pitch))


def is_beside(rows: int, columns: int, item: int) -> bool:
    """Whether a GEMM dispatches that many rows of tokens, of elements of `item` bytes, itself."""
    return rows * columns * item >= BESIDE


def clear_launch(words: Tensor) -> Launch:
    """The launch that makes a few int32 words zero."""
    kernel = load(Clear(), words.device.index)
    blocks = max(1, min(-(-words.numel() // kernel.threads), kernel.multiprocessors))
    return Launch(kernel, blocks, (words, words.numel()))


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
    combine_launch(rows, slots, weights, output, out).run()
    return out


def combine_launch(rows: Tensor, slots: Tensor, weights: Tensor | None, output: str, out: Tensor) -> Launch:
    """What `combine` launches."""
    given, wanted = (dtype_name(tensor.dtype) for tensor in (rows, out))
    kernel = load(Combine(given, wanted, output), out.device.index)
    blocks = min(-(-out.numel() // (8 * kernel.threads)), 16 * kernel.multiprocessors)
    return Launch(kernel, blocks, (rows, slots, weights, out, *slots.shape, out.shape[1]))
