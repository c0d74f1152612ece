"""On the CPU a rewritten model is not slower than the same model under plain Inductor (`pytest -m slow`).

Two layers, hidden 512, 16 experts, 512 tokens, the same threads, the median ratio of neighbouring runs in one process.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moecompile
import zoo_batched_mm
import zoo_capacity
import zoo_dense
import zoo_gather_einsum
import zoo_grouped_mm
import zoo_torchtitan

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS = 512, 512, 16, 512
BAR = 1.1
REPEATS = 15

# form -> one layer of that size
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "grouped_mm": lambda: zoo_grouped_mm.SortHistogram(HIDDEN, INTERMEDIATE, EXPERTS, 2),
    "batched_mm": lambda: zoo_batched_mm.RepeatedRows(HIDDEN, INTERMEDIATE // 4, EXPERTS, 2),
    "dense": lambda: zoo_dense.StackedExperts(HIDDEN, INTERMEDIATE, EXPERTS, 2),
    "torchtitan": lambda: zoo_torchtitan.ReorderAndScatter(HIDDEN, INTERMEDIATE, EXPERTS, 2),
    "capacity": lambda: zoo_capacity.GShardTopTwo(HIDDEN, INTERMEDIATE, EXPERTS, 1.0),
    "gather_einsum": lambda: zoo_gather_einsum.ConditionalFeedForward(HIDDEN, INTERMEDIATE // 4, EXPERTS, 2),
}
THREE_DIMENSIONS = ("dense", "torchtitan")


class TwoLayers(nn.Module):
    """Two residual layers of one form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[form]() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(x)
            x = x + (out[0] if isinstance(out, tuple) else out)
        return x


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def training_step(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()
    model.zero_grad()


def inference(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


@pytest.mark.slow
@pytest.mark.parametrize("run", [inference, training_step], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("form", list(LAYERS))
def test_not_slower_than_inductor(form: str, run: Callable[[nn.Module, Tensor], None]) -> None:
    torch.manual_seed(0)
    ours = TwoLayers(form)
    plain = copy.deepcopy(ours)
    dtype = next(parameter.dtype for parameter in ours.parameters())
    shape = (2, TOKENS // 2, HIDDEN) if form in THREE_DIMENSIONS else (TOKENS, HIDDEN)
    x = torch.randn(shape).to(dtype)
    ours.compile(backend="moecompile", fullgraph=True)
    plain.compile(fullgraph=True)
    for model in (ours, plain):
        for _ in range(3):
            run(model, x)
    assert len(moecompile.last_report().sites) == 2
    pairs = [(seconds(lambda: run(ours, x)), seconds(lambda: run(plain, x))) for _ in range(REPEATS)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)  # of neighbours: the machine's speed may drift
    print(f"{form} {run.__name__}: {mine * 1e3:.2f} ms, plain Inductor {theirs * 1e3:.2f} ms, ratio {ratio:.2f}")
    assert ratio <= BAR, f"{mine * 1e3:.1f} ms where plain Inductor takes {theirs * 1e3:.1f} ms, ratio {ratio:.2f}"
