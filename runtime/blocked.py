"""Grouped matrix products of any dtype on a device, in blocks of rows, without synchronisation with the host.

`torch._grouped_mm` copies the offsets to the host for every dtype but bfloat16. Here the rows of each expert are cut
into blocks of a fixed height, the last one padded. How many blocks there can be is known beforehand, whatever the
routing: R rows and E experts make at most R // height + min(R, E). Blocks are multiplied by `torch.bmm` with their
experts' matrices, a bounded number of blocks at a time, so that only a bounded piece of the weights is ever copied.

With heights near R / E the padding at most doubles the work; it is not the path of a fast model, it is the one that
is correct for float32 and float16 and can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

WORKSPACE_BYTES = 1 << 28
"""Room for the gathered matrices of the blocks that are multiplied at once."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows: `expert` (B,), 0 for an unused block; `rows` (B, height), R where the block is padded."""

    expert: Tensor
    rows: Tensor

    def chunks(self, bytes_per_block: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The blocks in pieces whose matrices fit the workspace."""
        size = max(1, WORKSPACE_BYTES // max(1, bytes_per_block))
        yield from zip(self.expert.split(size), self.rows.split(size), strict=True)


def blocks_of(offsets: Tensor, rows: int, height: int | None = None) -> Blocks:
    """Cuts `rows` rows, sorted by expert and ending at offsets (E,), into blocks of a height, or of one that fits."""
    experts = offsets.shape[0]
    if height is None:
        height = max(16, min(512, 1 << max(0, rows // experts - 1).bit_length()))
    bound = rows // height + min(rows, experts)
    ends = offsets.to(torch.int64)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    block_ends = torch.cumsum((ends - starts + height - 1) // height, 0)
    index = torch.arange(bound, device=offsets.device)
    expert = torch.searchsorted(block_ends, index, right=True)
    used, expert = expert < experts, expert.clamp(max=experts - 1)
    first_block = block_ends[expert] - (ends[expert] - starts[expert] + height - 1) // height
    first_row = starts[expert] + (index - first_block) * height
    row = first_row.unsqueeze(1) + torch.arange(height, device=offsets.device)
    inside = used.unsqueeze(1) & (row < ends[expert].unsqueeze(1))
    return Blocks(torch.where(used, expert, 0), torch.where(inside, row, rows))


def _padded(a: Tensor) -> Tensor:
    """The rows of a (R, F) and a row of zeros, (R + 1, F)."""
    return torch.cat((a, a.new_zeros(1, a.shape[1])))


def blocked_mm(a: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Row r of a (R, in) times its expert's matrix of (E, in, out), (R, out); rows beyond offsets[-1] are anything."""
    rows, out = a.shape[0], matrices.shape[2]
    result = a.new_zeros(rows + 1, out)
    source = _padded(a)
    for expert, row in blocks_of(offsets, rows).chunks(matrices[0].nbytes):
        result[row] = torch.bmm(source[row], matrices[expert])
    return result[:rows]


def blocked_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """For each expert left.T @ right over its rows, of left (R, M) and right (R, N): (E, M, N)."""
    inner = torch.promote_types(left.dtype, torch.float32)
    result = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1], dtype=inner)
    left, right = _padded(left), _padded(right)
    for expert, row in blocks_of(offsets, left.shape[0] - 1).chunks(result[0].nbytes):
        # index_put_ adds in a fixed order, index_add_ would not
        result.index_put_((expert,), torch.bmm(left[row].mT, right[row]).to(inner), accumulate=True)
    return result.to(left.dtype)


def blocked_sum(rows: Tensor, offsets: Tensor) -> Tensor:
    """For each expert the sum of its rows (R, F): (E, F), in float32 or better."""
    inner = torch.promote_types(rows.dtype, torch.float32)
    blocks = blocks_of(offsets, rows.shape[0])
    sums = _padded(rows)[blocks.rows].sum(1, dtype=inner)
    return sums.new_zeros(offsets.shape[0], rows.shape[1]).index_put_((blocks.expert,), sums, accumulate=True)
