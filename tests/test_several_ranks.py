"""FP8 on two ranks, which see different tokens: DDP with copies of matrices that are kept, FSDP2 without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import moecompile
from ranks_in_processes import start_ranks
from test_precision import block_of

RANKS, STEPS = 2, 2
EACH: dict[str, Any] = {"precision": "fp8", "lowering": "eager"}
KEPT: dict[str, Any] = {**EACH, "fp8_cache_weights": True}


def trained(rank: int, file: str, how: str) -> None:
    """Every rank: three models on their ways to the same weights."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=RANKS)
    try:
        (with_ddp if how == "ddp" else with_fsdp)(rank)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def tokens(like: Tensor, step: int, micro: int, rank: int) -> Tensor:
    torch.manual_seed(100 * step + 10 * micro + rank)
    return torch.randn_like(like)


def first_of(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def with_ddp(rank: int) -> None:
    """Copies are made of what a rank had before DDP gave it rank 0's weights, and again after each step."""
    module, (x,) = block_of("qwen3_moe")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + rank)  # not the other's
    ends: list[list[Tensor]] = []
    for options in (KEPT, EACH):
        torch._dynamo.reset()
        moecompile.reset()
        model = copy.deepcopy(module)
        model.compile(backend="moecompile", options=options, fullgraph=True)
        with torch.no_grad():
            own = first_of(model(x))
        notes = [note for graph in moecompile.last_report().graphs for note in graph.notes]
        assert ("FP8 copies of 2 matrices are kept between calls" in notes) == (options == KEPT)
        parallel = nn.parallel.DistributedDataParallel(model)
        with torch.no_grad():
            assert torch.equal(first_of(parallel(x)), own) == (rank == 0)
        optimizer = torch.optim.AdamW(parallel.parameters(), 0.01, fused=True)
        results = []
        for step in range(STEPS):
            optimizer.zero_grad()
            with parallel.no_sync():
                first_of(parallel(tokens(x, step, 0, rank))).square().mean().backward()
            results.append(first_of(parallel(tokens(x, step, 1, rank))))
            results[-1].square().mean().backward()
            optimizer.step()
        ends.append([*results, *parallel.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    _same_on_all([each.detach() for each in parallel.parameters()])


def with_fsdp(rank: int) -> None:
    """Matrices are put together from both ranks' halves and cast: the numbers of DDP."""
    module, (x,) = block_of("qwen3_moe")
    ends = []
    for how, options in (("ddp", EACH), ("fsdp", EACH), ("fsdp", {**EACH, "fp8_recast_weights": True})):
        torch._dynamo.reset()
        model: Any = copy.deepcopy(module)
        if how == "ddp":
            model.compile(backend="moecompile", options=options, fullgraph=True)
            model = nn.parallel.DistributedDataParallel(model)
        else:
            mesh = torch.distributed.init_device_mesh("cpu", (RANKS,))
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
            model.compile(backend="moecompile", options=options)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(STEPS):
            optimizer.zero_grad()
            first_of(model(tokens(x, step, 0, rank))).square().mean().backward()
            optimizer.step()
        again = "moecompile.quantize_weights(" in (moecompile.last_report().graphs[-1].backward or "")
        assert again == ("fp8_recast_weights" in options)
        ends.append([each.full_tensor() if how == "fsdp" else each.detach() for each in model.parameters()])
    first, *others = ends
    assert not all(torch.equal(*pair) for pair in zip(first, module.parameters(), strict=True)), "nothing was learnt"
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


def _same_on_all(tensors: list[Tensor]) -> None:
    for each in tensors:
        others = [torch.empty_like(each) for _ in range(RANKS)]
        torch.distributed.all_gather(others, each.contiguous())
        assert all(torch.equal(other, each) for other in others)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks(how: str, tmp_path: Path) -> None:
    start_ranks(RANKS, trained, (str(tmp_path / "store"), how))
