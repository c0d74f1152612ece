"""Rows on a Hopper GPU: products by moecompile's own grouped GEMM, in bfloat16 and float16."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.runtime import hopper
from moecompile.runtime.grouped import DeviceRows, aligned


class HopperRows(DeviceRows):
    """All assignments, on a GPU of compute capability 9.0. What the kernels do not take, PyTorch multiplies."""

    def _product(self, a: Tensor, matrices: Tensor) -> Tensor:
        a = a.contiguous()
        if not _takes(a, matrices):
            return super()._product(a, matrices)
        return hopper.grouped_gemm(a, matrices, self.offsets, a.new_empty(a.shape[0], matrices.shape[2]))

    def _outer(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = left.contiguous(), right.contiguous()
        if not _takes(left, right):
            return super()._outer(left, right)
        out = left.new_empty(self.offsets.shape[0], left.shape[1], right.shape[1])
        return hopper.grouped_outer(left, right, self.offsets, out)


def _takes(left: Tensor, right: Tensor) -> bool:
    """Whether bulk copies can read both: whole lines of 16 bytes, and something to read."""
    if left.dtype not in (torch.bfloat16, torch.float16) or right.dtype != left.dtype:
        return False
    whole = 16 // left.element_size()
    sizes = (*left.shape[1:], *right.shape[-2:]) if right.dim() == 3 else (left.shape[1], right.shape[1])
    return all(matrix.data_ptr() % 16 == 0 and aligned(matrix) for matrix in (left, right)) and not any(
        size % whole for size in sizes
    )
