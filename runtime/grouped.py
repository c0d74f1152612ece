"""Walks over rows sorted by expert: a few experts at a time on the CPU, all in grouped GEMMs elsewhere.

Both walks yield groups with the same methods, so that `moecompile.runtime.reference` is written once:

    Run          the rows of some experts, few enough to stay in cache between their GEMMs; a `torch.mm` for each expert
    AllExperts   every row at once; `torch._grouped_mm` or `moecompile.runtime.blocked`, the host never waits

No walk copies a whole weight tensor, and neither reads rows beyond the last expert's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moecompile.runtime.blocked import blocked_mm, blocked_outer, blocked_sum

Gradients = dict[str, Tensor]

RUN_BYTES = 1 << 21
"""Room for the hidden rows of a run on the CPU: with their activation and gradients they should stay in a core's L2."""


def row_dot(left: Tensor, right: Tensor) -> Tensor:
    """The dot product of each row, (n, 1), added up in float32 or better."""
    inner = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return (left * right).sum(-1, keepdim=True, dtype=inner)


class Run:
    """The rows of one or more consecutive experts on the CPU."""

    def __init__(self, walk: RunByRun, spans: list[tuple[int, int, int]]) -> None:
        self.walk = walk
        self.rows = slice(spans[0][1], spans[-1][2])
        self.experts = [expert for expert, _, _ in spans]
        self.sizes = [end - start for _, start, end in spans]

    def leaves(self, x: Tensor, weight_of: Tensor | None) -> dict[str, Tensor]:
        """`x` (n, H) of these rows and, if there are weights, `weight` (n, 1)."""
        found = {"x": self.gather(x)}
        if weight_of is not None:
            found["weight"] = weight_of.index_select(0, self.walk.assignments[self.rows]).unsqueeze(1)
        return found

    def gather(self, per_token: Tensor) -> Tensor:
        """The rows' entries of a tensor (T, F), shape (n, F)."""
        return per_token.index_select(0, self.walk.tokens[self.rows])

    def linear(
        self, a: Tensor, weight: Tensor, transposed: bool, bias: Tensor | None = None, into: Tensor | None = None
    ) -> Tensor:
        """Rows a (n, in) times their expert's matrix, plus its bias, (n, out); written to `into` if given."""
        matrices = weight if transposed else weight.mT
        if into is None:
            dtype = a.dtype if bias is None else torch.promote_types(a.dtype, bias.dtype)
            into = a.new_empty((a.shape[0], matrices.shape[2]), dtype=dtype)
        for expert, rows, result in zip(self.experts, a.split(self.sizes), into.split(self.sizes), strict=True):
            if into.dtype == a.dtype:
                torch.mm(rows, matrices[expert], out=result)
                if bias is not None:
                    result.add_(bias[expert])
            else:  # a bias is wider than the product
                product = torch.mm(rows, matrices[expert])
                result.copy_(product if bias is None else product + bias[expert])
        return into

    def weight_gradient(self, grads: Gradients, name: str, a: Tensor, grad: Tensor, transposed: bool) -> None:
        """Stores the gradients of the experts' matrices for a (n, in) and the products' gradient (n, out)."""
        left, right = (a, grad) if transposed else (grad, a)
        for expert, rows, columns in zip(self.experts, left.split(self.sizes), right.split(self.sizes), strict=True):
            torch.mm(rows.t(), columns, out=grads[name][expert])

    def bias_gradient(self, grads: Gradients, name: str, grad: Tensor) -> None:
        """Stores the gradients of the experts' biases for the sums' gradient (n, out)."""
        for expert, rows in zip(self.experts, grad.split(self.sizes), strict=True):
            grads[name][expert] = rows.sum(0)

    def bias_dot(self, bias: Tensor, grad: Tensor) -> Tensor:
        """Each row of grad (n, F) times its expert's bias of (E, F), summed in float32 or better, (n, 1)."""
        parts = zip(self.experts, grad.split(self.sizes), strict=True)
        return torch.cat([row_dot(rows, bias[expert]) for expert, rows in parts])


class RunByRun:
    """The walk over experts that have rows, for the CPU, where reading the offsets costs nothing.

    Experts with few rows share a run, so that elementwise work is called once for all of them.
    """

    def __init__(self, offsets: Tensor, order: Tensor, top_k: int, bytes_per_row: int) -> None:
        self.ends = offsets.tolist()
        self.rows = order.shape[0]
        self.total = self.ends[-1]
        self.complete = self.total == self.rows
        self.assignments = order[: self.total]
        self.tokens = self.assignments if top_k == 1 else self.assignments // top_k
        self.most_rows = RUN_BYTES // max(1, bytes_per_row)

    def __iter__(self) -> Iterator[Run]:
        spans: list[tuple[int, int, int]] = []
        start = 0
        for expert, end in enumerate(self.ends):
            if end == start:
                continue
            if spans and end - spans[0][1] > self.most_rows:
                yield Run(self, spans)
                spans = []
            spans.append((expert, start, end))
            start = end
        if spans:
            yield Run(self, spans)

    def room(self, like: Tensor, features: int, dtype: torch.dtype) -> Tensor | None:
        """Where the groups write values of their rows, (T*K, features)."""
        return like.new_empty((self.rows, features), dtype=dtype)

    def gradient_like(self, parameter: Tensor) -> Tensor:
        """Room for a parameter's gradient (E, ...): experts without rows are 0, the others unwritten."""
        grad = torch.empty_like(parameter)
        start = 0
        for expert, end in enumerate(self.ends):
            if end == start:
                grad[expert].zero_()
            start = end
        return grad

    def clear_rest(self, rows: Tensor) -> None:
        """Zeroes the rows (T*K, ...) that belong to no expert."""
        rows[self.total :].zero_()


class AllExperts:
    """Every row at once, on a device. Rows beyond the last expert's hold anything, `combine` leaves them out."""

    complete = False
    """Not known without asking the device."""

    def __init__(self, offsets: Tensor, order: Tensor, top_k: int) -> None:
        self.offsets = offsets
        self.rows = slice(None)
        self.unused = (order < 0).unsqueeze(1)
        self.assignments = order.clamp(min=0)
        self.tokens = self.assignments if top_k == 1 else self.assignments // top_k
        row = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
        self.expert = torch.searchsorted(offsets, row, right=True, out_int32=True)  # E beyond the last expert

    def __iter__(self) -> Iterator[AllExperts]:
        yield self

    def leaves(self, x: Tensor, weight_of: Tensor | None) -> dict[str, Tensor]:
        """`x` (T*K, H) of the rows and, if there are weights, `weight` (T*K, 1)."""
        found = {"x": self.gather(x)}
        if weight_of is not None:
            found["weight"] = weight_of.index_select(0, self.assignments).unsqueeze(1)
        return found

    def gather(self, per_token: Tensor) -> Tensor:
        """The rows' entries of a tensor (T, F), shape (T*K, F)."""
        return per_token.index_select(0, self.tokens)

    def linear(
        self, a: Tensor, weight: Tensor, transposed: bool, bias: Tensor | None = None, into: Tensor | None = None
    ) -> Tensor:
        """Each row of a (T*K, in) times its expert's matrix, plus its bias, (T*K, out); written to `into` if given."""
        matrices = weight if transposed else weight.transpose(1, 2)
        a = a.contiguous()
        if takes_grouped_mm(a, matrices):
            product = torch._grouped_mm(a, matrices, offs=self.offsets)
        else:
            product = blocked_mm(a, matrices, self.offsets)
        if bias is not None:
            product = product + self._bias(bias)
        return product if into is None else into.copy_(product)

    def weight_gradient(self, grads: Gradients, name: str, a: Tensor, grad: Tensor, transposed: bool) -> None:
        """Stores the gradient of the matrices for a (T*K, in) and the products' gradient (T*K, out)."""
        left, right = (a.contiguous(), grad.contiguous()) if transposed else (grad.contiguous(), a.contiguous())
        if takes_grouped_mm(left.t(), right):
            found = torch._grouped_mm(left.t(), right, offs=self.offsets)
        else:
            found = blocked_outer(left, right, self.offsets)
        if found.stride() != grads[name].stride():
            found = torch.empty_like(grads[name], device=found.device).copy_(found)
        grads[name] = found

    def bias_gradient(self, grads: Gradients, name: str, grad: Tensor) -> None:
        """Stores the gradient of the biases for the sums' gradient (T*K, out)."""
        grads[name] = blocked_sum(grad, self.offsets).to(grads[name].dtype)

    def bias_dot(self, bias: Tensor, grad: Tensor) -> Tensor:
        """Each row of grad (T*K, F) times its expert's bias of (E, F), summed in float32 or better, (T*K, 1)."""
        return row_dot(grad, self._bias(bias))

    def _bias(self, bias: Tensor) -> Tensor:
        return bias.index_select(0, self.expert.clamp(max=bias.shape[0] - 1))

    def room(self, like: Tensor, features: int, dtype: torch.dtype) -> Tensor | None:
        """None: what the one group returns is whole."""
        return None

    def gradient_like(self, parameter: Tensor) -> Tensor:
        """The layout that a parameter's gradient (E, ...) is to have, without memory."""
        return torch.empty_like(parameter, device="meta")

    def clear_rest(self, rows: Tensor) -> None:
        """Zeroes the rows (T*K, ...) that belong to no expert."""
        rows.masked_fill_(self.unused, 0)


Group = Run | AllExperts
Walk = RunByRun | AllExperts


def part(rows: Tensor | None, group: Group) -> Tensor | None:
    """The group's part of `room`."""
    return None if rows is None else rows[group.rows]


def groups(offsets: Tensor, order: Tensor, top_k: int, bytes_per_row: int) -> Walk:
    """The walk for the device of `offsets` (E,); order (T*K,) as `plan` gives them.

    bytes_per_row is the size of the largest value of a row, which on the CPU decides how many rows go together.
    """
    if offsets.device.type == "cpu":
        return RunByRun(offsets, order, top_k, bytes_per_row)
    return AllExperts(offsets, order, top_k)


def takes_grouped_mm(left: Tensor, right: Tensor) -> bool:
    """Whether `torch._grouped_mm` multiplies these without asking the host.

    It does for bfloat16 with strides of whole 16 bytes on compute capability 9 and 10 (GroupedBlas.cpp, torch 2.9 to
    2.13); for anything else it copies the offsets to the host and loops, or refuses.
    """
    if left.dtype != torch.bfloat16 or left.device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(left.device)[0] not in (9, 10):
        return False
    return all(_aligned(matrix) for matrix in (left, right))


def _aligned(matrix: Tensor) -> bool:
    rows, columns = matrix.stride()[-2:]
    if matrix.data_ptr() % 16 or min(rows, columns) != 1 or 0 in matrix.shape[-2:]:
        return False
    elements = 16 // matrix.element_size()
    return max(rows, columns) % elements == 0 and all(stride % elements == 0 for stride in matrix.stride()[:-2])
