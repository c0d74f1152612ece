"""Routing on a Hopper GPU: the plan, tokens to rows in expert order, and rows back to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.codegen.instances import IDS, PLAN_EXPERTS, Combine, Dispatch, Plan
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.launch import load

PLAN_BLOCKS = 128
"""Blocks that make a plan, at most: each adds up the counts of all before it."""


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
    ids = expert_ids.contiguous()
    if dtype_name(ids.dtype) not in IDS:
        ids = ids.to(torch.int64)
    assignments, device = ids.numel(), ids.device.index
    counts = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    offsets = torch.empty_like(counts)
    slots = torch.empty_like(ids, dtype=torch.int32)
    order = torch.empty(assignments, dtype=torch.int32, device=ids.device)
    chosen = dtype_name(ids.dtype), next(room for room in PLAN_EXPERTS if num_experts <= room)
    place = load(Plan("place", *chosen), device)
    blocks = min(max(1, -(-assignments // place.threads)), PLAN_BLOCKS)
    block_counts = None
    if blocks > 1:
        block_counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=ids.device)
        count = load(Plan("count", *chosen), device)
        count.launch(blocks, count.pack(ids, block_counts, assignments, num_experts))
    place.launch(blocks, place.pack(ids, block_counts, counts, offsets, slots, order, assignments, num_experts))
    return counts, offsets, slots, order


def dispatch(x: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """rows[slots[t, k], :] = x[t, :] for every k.

    Args:
        x: (T, H), contiguous; a row is a multiple of 16 bytes.
        slots: (T, K) int32, contiguous; nothing is written where it is -1.
        rows: (R, H) of x's dtype, contiguous.

    Returns:
        rows.
    """
    kernel = load(Dispatch(), rows.device.index)
    pieces = x.shape[1] * x.element_size() // 16
    warps = x.shape[0] * -(-pieces // 128)
    blocks = min(-(-warps * 32 // kernel.threads), 32 * kernel.multiprocessors)
    kernel.launch(blocks, kernel.pack(x, slots, rows, *slots.shape, pieces))
    return rows


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
    kernel.launch(blocks, kernel.pack(rows, slots, weights, out, *slots.shape, out.shape[1]))
    return out
