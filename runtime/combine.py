"""The combine: rows in expert order back to tokens, weighted by the output expression and summed over the experts.

Sums run in float32 or better and are rounded once. On the CPU `embedding_bag` gathers, weights and sums in one pass;
elsewhere, and for output expressions of other forms, rows are gathered, evaluated and summed one after another.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moecompile.runtime.contract import Arguments, weighting
from moecompile.runtime.elementwise import evaluate
from moecompile.runtime.grouped import writing_out

BAG_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weighted_sum(args: Arguments, rows: Tensor, complete: bool) -> Tensor:
    """The result (T, H2) of rows (R, H2) that GEMM2 left in expert order.

    complete says that every assignment has an expert; otherwise rows of those without are absent or hold anything.
    """
    weights, dtype = args.weights, args.dtypes.result
    form = weighting(args.output)
    if weights is None or form is None or form.of_weight is None or form.after:
        return _evaluated_sum(args, rows, complete)
    weights = functools.reduce(Tensor.to, form.of_weight, weights)
    product = torch.promote_types((rows.dtype, *form.of_out)[-1], weights.dtype)
    if not _fits_bag(rows, product, dtype):
        return _evaluated_sum(args, rows, complete)
    rows = functools.reduce(Tensor.to, form.of_out, rows).to(product)
    weights = weights.to(product)
    if not complete:
        weights = torch.where(args.slots < 0, 0, weights)
    return _bag(rows, args.slots, weights, complete).to(dtype)


def token_sum(rows: Tensor, slots: Tensor, dtype: torch.dtype, complete: bool) -> Tensor:
    """Sums the rows (R, F) of each token's slots (T, K), shape (T, F); slots of -1 add nothing."""
    if slots.shape[1] > 1 and _fits_bag(rows, rows.dtype, dtype):
        return _bag(rows, slots, None, complete).to(dtype)
    return _sum(_gather(rows, slots), slots, dtype, complete)


def _evaluated_sum(args: Arguments, rows: Tensor, complete: bool) -> Tensor:
    leaves = {"out": _gather(rows, args.slots)}
    if args.weights is not None:
        leaves["weight"] = args.weights.reshape(-1, 1)
    return _sum(evaluate(args.output, leaves), args.slots, args.dtypes.result, complete)


def _gather(rows: Tensor, slots: Tensor) -> Tensor:
    """Rows in token order (T*K, F); those of slot -1 hold anything."""
    if rows.shape[0] == 0:
        return rows.new_zeros(slots.numel(), rows.shape[1])
    return rows.index_select(0, slots.reshape(-1).clamp(min=0))


def _sum(rows: Tensor, slots: Tensor, dtype: torch.dtype, complete: bool) -> Tensor:
    """Rows (T*K, F) in token order summed over K, (T, F), without those of slot -1."""
    if not complete:
        rows = rows.masked_fill(slots.reshape(-1, 1) < 0, 0)
    if slots.shape[1] == 1:
        return rows.to(dtype)
    parts = rows.view(*slots.shape, rows.shape[1])
    inner = torch.promote_types(rows.dtype, dtype)
    if slots.shape[1] == 2 and inner == rows.dtype and not writing_out.get():
        # one addition rounds once and is much faster than sum, where no compiler fuses the sum with what it adds
        return (parts[:, 0] + parts[:, 1]).to(dtype)
    return parts.sum(1, dtype=inner).to(dtype)


def _fits_bag(rows: Tensor, inner: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether `embedding_bag` sums rows of `inner` quickly and does not round below what `dtype` keeps."""
    return (
        rows.device.type == "cpu"
        and not writing_out.get()
        and rows.numel() > 0
        and inner in BAG_DTYPES
        and torch.promote_types(inner, dtype) == inner
    )


def _bag(rows: Tensor, slots: Tensor, weights: Tensor | None, complete: bool) -> Tensor:
    if not complete:  # a row of zeros for the slots without an expert
        slots = torch.where(slots < 0, rows.shape[0], slots)
        rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    return torch.nn.functional.embedding_bag(slots, rows, mode="sum", per_sample_weights=weights)
