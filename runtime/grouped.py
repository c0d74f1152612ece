"""Rows sorted by expert, and the grouped products over them, on the CPU and on any other device.

`CpuRows` holds the rows that have an expert: how many each expert has costs nothing to read there. `DeviceRows` holds
all T*K of them, those without an expert last and with any content, because the host never asks the device where they
begin. Both have the same methods, so that `moecompile.runtime.reference` and `.backward` are written once:

    linear             each row times its expert's matrix       torch._grouped_mm, or on the CPU a torch.mm for each
    weight_gradient    each expert's outer product of rows      expert, or on devices moecompile.runtime.blocked
    chunks             rows whose elementwise work goes together, few enough on the CPU to stay in cache

No product copies a whole weight tensor.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Tensor

from moecompile.runtime.blocked import blocked_mm, blocked_outer, blocked_sum

CHUNK_BYTES = 1 << 20
"""Room for the hidden rows of a chunk on the CPU: with activation and gradients they should stay in a core's L2."""
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What torch._grouped_mm multiplies on the CPU (GroupedMMUtils.h, torch 2.11 to 2.13)."""


class Rows:
    """What both kinds of rows share: `tokens` and `assignments` of each row, `offsets` of the experts."""

    offsets: Tensor
    tokens: Tensor
    assignments: Tensor
    complete: bool
    """Whether every assignment is known to have an expert."""

    def leaves(self, x: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
        """`x` (R, H) of the rows and, if there are weights (T, K), `weight` (R, 1)."""
        found = {"x": self.gather(x)}
        if weights is not None:
            found["weight"] = self.weight(weights)
        return found

    def weight(self, weights: Tensor) -> Tensor:
        """The routing weight (R, 1) of the rows, of the weights (T, K)."""
        return weights.reshape(-1).index_select(0, self.assignments).unsqueeze(1)

    def gather(self, per_token: Tensor) -> Tensor:
        """The rows' entries of a tensor (T, F), shape (R, F)."""
        return per_token.index_select(0, self.tokens)

    def linear(self, a: Tensor, weight: Tensor, transposed: bool, bias: Tensor | None = None) -> Tensor:
        """Each row of a (R, in) times its expert's matrix, plus its bias, (R, out)."""
        product = self._product(a, weight if transposed else weight.mT)
        return product if bias is None else self._add_bias(product, bias)

    def weight_gradient(self, parameter: Tensor, a: Tensor, grad: Tensor, transposed: bool) -> Tensor:
        """The gradient of the experts' matrices for a (R, in) and the products' gradient (R, out), laid out alike."""
        left, right = (a, grad) if transposed else (grad, a)
        if parameter.mT.is_contiguous() and not parameter.is_contiguous():
            return self._outer(right, left).mT
        found, like = self._outer(left, right), torch.empty_like(parameter, device="meta")
        return found if found.stride() == like.stride() else torch.empty_like(parameter).copy_(found)

    def _product(self, a: Tensor, matrices: Tensor) -> Tensor:
        raise NotImplementedError

    def _add_bias(self, product: Tensor, bias: Tensor) -> Tensor:
        raise NotImplementedError

    def _outer(self, left: Tensor, right: Tensor) -> Tensor:
        raise NotImplementedError


class CpuRows(Rows):
    """The rows that have an expert, on the CPU."""

    def __init__(self, offsets: Tensor, order: Tensor, top_k: int, bytes_per_row: int) -> None:
        ends = offsets.tolist()
        sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        self.offsets, self.total = offsets, ends[-1]
        self.complete = self.total == order.shape[0]
        self.experts = [expert for expert, size in enumerate(sizes) if size]
        self.sizes = [size for size in sizes if size]
        # torch._grouped_mm also visits experts without rows: for a few rows a loop over the others is quicker
        self.dense = 2 * len(self.experts) >= len(sizes)
        self.assignments = order[: self.total]
        self.tokens = self.assignments if top_k == 1 else self.assignments // top_k
        self.chunk_rows = max(1, CHUNK_BYTES // max(1, bytes_per_row))

    def chunks(self) -> list[slice]:
        """Slices of the rows."""
        starts = range(0, self.total, self.chunk_rows)
        return [slice(start, min(start + self.chunk_rows, self.total)) for start in starts] or [slice(0, 0)]

    def every(self, rows: Tensor, count: int) -> Tensor:
        """The rows followed by zeros for the assignments without an expert, (count, F)."""
        if self.complete:
            return rows
        padded = rows.new_empty(count, rows.shape[1])
        padded[: self.total] = rows
        padded[self.total :] = 0
        return padded

    def _product(self, a: Tensor, matrices: Tensor) -> Tensor:
        if self.dense and a.dtype in GROUPED_DTYPES and aligned(a) and aligned(matrices):
            return torch._grouped_mm(a, matrices, offs=self.offsets)
        product = a.new_empty(a.shape[0], matrices.shape[2])
        for expert, rows, out in zip(self.experts, a.split(self.sizes), product.split(self.sizes), strict=True):
            torch.mm(rows, matrices[expert], out=out)
        return product

    def _add_bias(self, product: Tensor, bias: Tensor) -> Tensor:
        product = product.to(torch.promote_types(product.dtype, bias.dtype))
        for expert, rows in zip(self.experts, product.split(self.sizes), strict=True):
            rows.add_(bias[expert])
        return product

    def _outer(self, left: Tensor, right: Tensor) -> Tensor:
        if self.dense and left.dtype in GROUPED_DTYPES and aligned(left) and aligned(right):
            return torch._grouped_mm(left.t(), right, offs=self.offsets)
        shape = (self.offsets.shape[0], left.shape[1], right.shape[1])
        found = left.new_zeros(shape) if len(self.experts) < shape[0] else left.new_empty(shape)
        for expert, one, other in zip(self.experts, left.split(self.sizes), right.split(self.sizes), strict=True):
            torch.mm(one.t(), other, out=found[expert])
        return found

    def bias_gradient(self, parameter: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the experts' biases (E, F) for the sums' gradient (R, F)."""
        found = torch.zeros_like(parameter)
        for expert, rows in zip(self.experts, grad.split(self.sizes), strict=True):
            found[expert] = rows.sum(0)
        return found

    def bias_dot(self, bias: Tensor, grad: Tensor) -> Tensor:
        """Each row of grad (R, F) times its expert's bias of (E, F), summed in float32 or better, (R, 1)."""
        dots = [row_dot(grad[:0], bias[0])]  # there may be no rows at all
        for expert, rows in zip(self.experts, grad.split(self.sizes), strict=True):
            dots.append(row_dot(rows, bias[expert]))
        return torch.cat(dots)


class DeviceRows(Rows):
    """All assignments, on a device other than the CPU."""

    complete = False

    def __init__(self, offsets: Tensor, order: Tensor, top_k: int) -> None:
        self.offsets = offsets
        self.unused = (order < 0).unsqueeze(1)
        self.assignments = order.clamp(min=0)
        self.tokens = self.assignments if top_k == 1 else self.assignments // top_k
        row = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
        expert = torch.searchsorted(offsets, row, right=True, out_int32=True)
        self.expert = expert.clamp(max=offsets.shape[0] - 1)

    def chunks(self) -> list[slice]:
        """One slice of all rows."""
        return [slice(None)]

    def every(self, rows: Tensor, count: int) -> Tensor:
        """The rows with zeros for the assignments without an expert."""
        return rows.masked_fill(self.unused, 0)

    def _product(self, a: Tensor, matrices: Tensor) -> Tensor:
        a = a.contiguous()
        if takes_grouped_mm(a, matrices):
            return torch._grouped_mm(a, matrices, offs=self.offsets)
        return blocked_mm(a, matrices, self.offsets)

    def _add_bias(self, product: Tensor, bias: Tensor) -> Tensor:
        return product + bias.index_select(0, self.expert)

    def _outer(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = left.contiguous(), right.contiguous()
        if takes_grouped_mm(left.t(), right):
            return torch._grouped_mm(left.t(), right, offs=self.offsets)
        return blocked_outer(left, right, self.offsets)

    def bias_gradient(self, parameter: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the experts' biases (E, F) for the sums' gradient (R, F)."""
        return torch.empty_like(parameter).copy_(blocked_sum(grad, self.offsets))

    def bias_dot(self, bias: Tensor, grad: Tensor) -> Tensor:
        """Each row of grad (R, F) times its expert's bias of (E, F), summed in float32 or better, (R, 1)."""
        return row_dot(grad, bias.index_select(0, self.expert))


class WrittenOutRows(DeviceRows):
    """All assignments, in code that is traced for a compiler to fuse: one product each, on any device."""

    def _product(self, a: Tensor, matrices: Tensor) -> Tensor:
        return torch._grouped_mm(a, matrices, offs=self.offsets)

    def _outer(self, left: Tensor, right: Tensor) -> Tensor:
        # Inductor would compute the rows transposed, element by element; it makes them as they are for as_strided
        transposed = left.contiguous().as_strided(left.shape[::-1], (1, left.shape[1]))
        return torch._grouped_mm(transposed, right, offs=self.offsets)


writing_out: ContextVar[bool] = ContextVar("writing_out", default=False)
"""Whether the reference is being traced, to be written out in a graph."""


def rows_of(
    offsets: Tensor, order: Tensor, top_k: int, bytes_per_row: int, kernels: str | None = None
) -> CpuRows | DeviceRows:
    """The rows on the device of `offsets` (E,); order (T*K,) as `plan` gives them.

    bytes_per_row is the size of the largest value of a row, which on the CPU decides how many rows go together. With
    kernels="reference" all products are PyTorch's.
    """
    if writing_out.get():
        return WrittenOutRows(offsets, order, top_k)
    if offsets.device.type == "cpu":
        return CpuRows(offsets, order, top_k, bytes_per_row)
    if kernels is None and offsets.device.type == "cuda":
        from moecompile.runtime import hopper

        if hopper.usable(offsets.device.index):
            from moecompile.runtime.hopper_rows import HopperRows

            return HopperRows(offsets, order, top_k)
    return DeviceRows(offsets, order, top_k)


def row_dot(left: Tensor, right: Tensor) -> Tensor:
    """The dot product of each row, (n, 1), added up in float32 or better."""
    inner = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return (left * right).sum(-1, keepdim=True, dtype=inner)


def takes_grouped_mm(left: Tensor, right: Tensor) -> bool:
    """Whether a device's `torch._grouped_mm` multiplies these without asking the host.

    It does for bfloat16 on compute capability 9 and 10 (GroupedBlas.cpp, torch 2.9 to 2.13); for anything else it
    copies the offsets to the host and loops, or refuses.
    """
    if left.dtype != torch.bfloat16 or left.device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(left.device)[0] not in (9, 10):
        return False
    return all(matrix.data_ptr() % 16 == 0 and aligned(matrix) for matrix in (left, right))


def aligned(matrix: Tensor) -> bool:
    """Whether the last two dimensions have strides that `torch._grouped_mm` takes: one is 1, the other 16 bytes."""
    if 0 in matrix.shape:
        return False
    rows, columns = matrix.stride()[-2:]
    unit, pitch, extent = (columns, rows, matrix.shape[-1]) if columns == 1 else (rows, columns, matrix.shape[-2])
    whole = 16 // matrix.element_size()
    return unit == 1 and pitch >= extent and all(stride % whole == 0 for stride in (pitch, *matrix.stride()[:-2]))
