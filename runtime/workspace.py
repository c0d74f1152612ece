"""Where tensors that nobody but kernels sees lie in one piece of memory, made at once.

To make a tensor takes the host microseconds, a good part of a call of few tokens, and kernels want an address alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 512
"""Bytes, of each tensor's beginning, as PyTorch's allocator has it."""


@dataclass(frozen=True)
class Life:
    """A tensor that a program makes.

    Attributes:
        size: in bytes.
        begin: the step that makes it.
        end: the last step that reads or writes it.
    """

    size: int
    begin: int
    end: int

    def meets(self, other: Life) -> bool:
        """Whether both are there in the same step."""
        return self.begin <= other.end and other.begin <= self.end


def lay_out(lives: Sequence[Life]) -> tuple[list[int], int]:
    """Offsets at which no two tensors that meet share memory, first fit in the order given, and the size of it all."""
    offsets: list[int] = []
    for number, life in enumerate(lives):
        taken = sorted(
            (offset, offset + _aligned(other.size))
            for offset, other in zip(offsets, lives[:number], strict=True)
            if life.meets(other)
        )
        at = 0
        for begin, end in taken:
            if at + _aligned(life.size) <= begin:
                break
            at = max(at, end)
        offsets.append(at)
    return offsets, max((at + _aligned(life.size) for at, life in zip(offsets, lives, strict=True)), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
