"""Counts stand in the experts' order and are exact; the inverse of an inverse is none; every write is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moecompile  # noqa: F401  (registers the operators)
from moecompile.passes.detect import detect
from zoo_capture import captured
from zoo_case import weight

BF16 = torch.bfloat16


class Sorted(nn.Module):
    """Sorted rows, two grouped GEMMs, un-permuted and summed; one step may be changed."""

    def __init__(self, step: str = "", change: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        super().__init__()
        self.step, self.change = step, change
        self.router = nn.Linear(32, 4, bias=False, dtype=BF16)
        self.w_in = weight(4, 32, 64, fan_in=32, dtype=BF16)
        self.w_out = weight(4, 64, 32, fan_in=64, dtype=BF16)

    def changed(self, step: str, value: Tensor) -> Tensor:
        return self.change(value) if step == self.step else value

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        key, order = ids.view(-1).sort()
        mask = self.changed("mask", F.one_hot(key, 4))
        offs = self.changed("offsets", self.changed("counts", mask.sum(0)).cumsum(0)).to(torch.int32)
        rows = x[order // 2]
        self.changed("ids", ids)
        y = torch._grouped_mm(F.gelu(torch._grouped_mm(rows, self.w_in, offs=offs)), self.w_out, offs=offs)
        inverse = self.changed("inverse", order.argsort())
        return (y[inverse].view(-1, 2, 32) * weights.unsqueeze(-1)).sum(1)


def remainder(ids: Tensor) -> Tensor:
    ids %= 2
    return ids


def exclusive_or(ids: Tensor) -> Tensor:
    ids ^= 1
    return ids


REFUSED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "sorted counts": ("counts", lambda counts: counts.sort().values),
    "permuted counts": ("counts", lambda counts: counts[torch.tensor([1, 0, 3, 2])]),
    "one expert's count": ("counts", lambda counts: counts[torch.zeros(4, dtype=torch.int64)]),
    "transposed counts": ("counts", lambda counts: counts.view(2, 2).t().reshape(-1)),
    "rounded counts": ("counts", lambda counts: counts.to(BF16)),
    "counts summed in bfloat16": ("mask", lambda mask: mask.to(BF16)),
    "permuted offsets": ("offsets", lambda offsets: offsets[torch.tensor([1, 0, 3, 2])]),
    "the inverse, twice": ("inverse", lambda inverse: inverse[inverse]),
    "the ids, written by %=": ("ids", remainder),
    "the ids, written by ^=": ("ids", exclusive_or),
}


def sites(module: nn.Module) -> int:
    torch.manual_seed(0)
    return len(detect(captured(module, (torch.randn(24, 32).to(BF16).requires_grad_(),)).gm.graph).sites)


def test_the_unchanged_module_is_found() -> None:
    assert sites(Sorted()) == 1


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    assert sites(Sorted(*REFUSED[name])) == 0
