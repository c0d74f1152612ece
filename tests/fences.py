"""Tensors between fences: nobody writes beside them unseen, and what nobody has written in them is NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.runtime.remembered import CALLS

FENCE = 1 << 20
"""Bytes before a tensor and behind it; they keep its memory aligned as the allocator does."""
STANDING = 0x5A
POISON = 0xFF
"""NaN in every floating-point format, e4m3 included, and -1 as an integer."""


@dataclass
class Fences:
    """What was made between fences: the memory, and the bytes of the tensor in its middle."""

    made: list[tuple[Tensor, int]] = field(default_factory=list)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor full of POISON."""
        count = math.prod(shape) * dtype.itemsize
        whole = torch.full((count + 2 * FENCE,), STANDING, dtype=torch.uint8, device=device)
        self.made.append((whole, count))
        return whole[FENCE : FENCE + count].fill_(POISON).view(dtype).view(shape)

    def check(self) -> None:
        """Fails if anything beside a tensor was written."""
        for whole, count in self.made:
            beside = torch.cat((whole[:FENCE], whole[FENCE + count :]))
            assert bool((beside == STANDING).all()), f"written beside a tensor of {count} bytes"


@contextmanager
def fenced(least: int = 1) -> Iterator[Fences]:
    """Every tensor that `new_empty` or `empty_like` makes on a device inside lies between fences, checked at the end.

    There have to be `least` of them, so that the kernels write where fences are.
    """
    fences = Fences()
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def make(like: Tensor, *size: Any, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        if others or not like.is_cuda:
            return new_empty(like, *size, dtype=dtype, **others)
        return fences.empty(shape, dtype or like.dtype, like.device)

    def make_like(like: Tensor, **others: Any) -> Tensor:
        return empty_like(like, **others) if others or not like.is_contiguous() else make(like, like.shape)

    CALLS.clear()  # what is remembered has its own way to make tensors
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", make)
        patched.setattr(torch, "empty_like", make_like)
        yield fences
    CALLS.clear()
    assert len(fences.made) >= least, "the kernels write into tensors made elsewhere"
    fences.check()
