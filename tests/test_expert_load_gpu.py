"""The option `expert_load` on a GPU: in CUDA graphs, and without a synchronisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import moecompile
from small_models import Model, inputs
from test_expert_load import assigned, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("train", [False, True])
def test_cuda_graphs_count(train: bool) -> None:
    """Replays add to the same tensors, and no graph is given up for writing its inputs."""
    model, x = Model().cuda(), inputs().cuda()
    expected = assigned(model, x)
    options: dict[str, Any] = {"expert_load": True, "inductor": {"triton.cudagraphs": True}}
    run = torch.compile(model, backend="moecompile", fullgraph=True, options=options)
    counters.clear()
    places: set[int] = set()
    for call in range(1, 7):
        model.zero_grad(set_to_none=True)  # gradients lie in a graph's memory
        torch.compiler.cudagraph_mark_step_begin()
        with torch.set_grad_enabled(train):
            result = run(x)
            if train:
                result.sum().backward()
        found = moecompile.expert_load(model)
        same(found, expected, call)
        places |= {each.data_ptr() for each in found.values()}
    assert len(places) == 2 and not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("train", [False, True])
def test_nobody_waits_for_the_device(train: bool) -> None:
    model, x = Model().cuda(), inputs().cuda()
    run = torch.compile(model, backend="moecompile", fullgraph=True, options={"lowering": "eager", "expert_load": True})
    total: list[Tensor] = []
    for quiet in (False, False, False, True):
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        try:
            with torch.set_grad_enabled(train):
                result = run(x)
                if train:
                    result.sum().backward()
            total = [each.clone() for each in moecompile.expert_load(model).values()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(total, assigned(model, x).values(), strict=True):
        assert torch.equal(one, 4 * other)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_counts_are_those_of_a_plan(dtype: torch.dtype) -> None:
    ids = torch.randint(-1, 64, (4096, 8), device="cuda").to(dtype)
    found = torch.ops.moecompile.count_experts(ids, 64)
    assert torch.equal(found, torch.ops.moecompile.plan(ids, 64)[0])
