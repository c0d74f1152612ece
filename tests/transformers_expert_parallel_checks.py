"""What ranks check together of transformers' models (tests/test_transformers_expert_parallel.py)."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import moecompile
from expert_parallel_checks import close, compiled, mesh_of, meaned, with_mean_of_others
from moecompile.report import GraphReport
from tiny_sizes import Sizes
from tiny_transformers import build_model, model_class

ONE_LAYER = Sizes(layers=1)


def results(run: Callable[..., Any], model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Logits, and gradients of all parameters, those of sharded ones whole."""
    model.zero_grad()
    out = run(input_ids=ids, use_cache=False).logits
    (out.float() ** 2).mean().backward()
    found = [out.detach()]
    for parameter in model.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append(grad.full_tensor() if isinstance(grad, DTensor) else grad)
    return found


def tokens_of(seed: int, count: int) -> Tensor:
    """One sequence."""
    return torch.randint(3, 256, (1, count), generator=torch.Generator().manual_seed(seed))


def graph_of() -> GraphReport:
    """The one graph that was compiled last."""
    (graph,) = moecompile.last_report().graphs
    return graph


def checks_exchange(graph: GraphReport, blocks: int) -> None:
    """Every block was found, and exchanges tokens; nothing is gathered."""
    assert len(graph.sites) == blocks and not graph.near_misses
    assert graph.after.count("dispatch_start") == blocks and "gather_experts" not in graph.after


def in_parallel(whole: nn.Module, implementation: str, shared: bool) -> nn.Module:
    """A copy whose experts transformers itself spreads over all ranks; `shared`: which all have the same batch."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    model: Any = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(), 1), mesh_dim_names=("ep", "alone"))
    plan = model._expand_parallel_plan(dict(model.ep_plan))
    batch: DeviceMesh = mesh["ep"] if shared else mesh["alone"]
    apply_expert_parallelism(model, mesh["ep"], batch, plan, ep_implementation=implementation)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), whole.parameters(), strict=True):
            if isinstance(parameter, DTensor):
                parameter.copy_(distribute_tensor(value.detach(), parameter.device_mesh, parameter.placements))
    return model


def summed(found: list[Tensor], model: nn.Module) -> list[Tensor]:
    """Gradients of experts as transformers makes them: the sum over all ranks' tokens."""
    for parameter, grad in zip(model.parameters(), found[1:], strict=True):
        if isinstance(parameter, DTensor):
            distributed.all_reduce(grad)
    return found


# shard_experts


def sharded(name: str, implementation: str, dtype: torch.dtype, rank: int, ranks: int) -> None:
    """Eager and compiled, forward and backward, as the whole model; ranks have different numbers of tokens."""
    model = build_model(name, dtype, implementation, ONE_LAYER)
    whole, ids = copy.deepcopy(model), tokens_of(rank, 6 + 3 * rank)
    moecompile.shard_experts(model, mesh_of(ranks))
    right = meaned(results(whole, whole, ids), whole)
    eager = with_mean_of_others(results(model, model, ids), model)
    assert torch.equal(eager[0], right[0])
    close(eager, right, 1e-5 if dtype == torch.float32 else 1e-2)
    found = with_mean_of_others(results(compiled(model), model, ids), model)
    close(found, right, 1e-5 if dtype == torch.float32 else 3e-2)
    checks_exchange(graph_of(), 1)


def check_qwen3_sharded(rank: int, ranks: int) -> None:
    sharded("qwen3_moe", "grouped_mm", torch.float32, rank, ranks)


def check_qwen3_sharded_in_bfloat16(rank: int, ranks: int) -> None:
    sharded("qwen3_moe", "grouped_mm", torch.bfloat16, rank, ranks)


def check_gpt_oss_sharded(rank: int, ranks: int) -> None:
    """Whose biases, of two dimensions, stay whole on every rank."""
    sharded("gpt_oss", "grouped_mm", torch.float32, rank, ranks)


def check_gpt_oss_with_batched_products_sharded(rank: int, ranks: int) -> None:
    sharded("gpt_oss", "batched_mm", torch.float32, rank, ranks)


def check_deepseek_sharded(rank: int, ranks: int) -> None:
    sharded("deepseek_v3", "grouped_mm", torch.float32, rank, ranks)


def check_a_loop_that_breaks_the_graph_does_not_hang(rank: int, ranks: int) -> None:
    """Ranks run the loop's turns another number of times, each in graphs of its own."""
    model: Any = build_model("qwen3_moe", torch.float32, "eager", ONE_LAYER)
    whole, ids = copy.deepcopy(model), tokens_of(rank, 1 + 5 * rank)
    moecompile.shard_experts(model, mesh_of(ranks))
    right = meaned(results(whole, whole, ids), whole)
    run = torch.compile(model, backend="moecompile", options={"lowering": "eager"})
    close(with_mean_of_others(results(run, model, ids), model), right, 1e-5)
    assert all("gather_experts" not in graph.after for graph in moecompile.last_report().graphs)


# transformers' own forms


def check_all_reduce_computes_what_it_did(rank: int, ranks: int) -> None:
    """Whether or not the local part is rewritten: the ranks' parts are summed once."""
    for implementation, blocks in (("grouped_mm", 0), ("batched_mm", 1)):
        whole = build_model("qwen3_moe", torch.float32, implementation, ONE_LAYER)
        model, ids = in_parallel(whole, "all_reduce", shared=True), tokens_of(0, 5)
        close(results(compiled(model), model, ids), results(whole, whole, ids), 1e-5)
        assert len(graph_of().sites) == blocks
        with torch.no_grad():
            found, right = (run(input_ids=ids, use_cache=False).logits for run in (compiled(model), whole))
        close([found], [right], 1e-5)
        graph = graph_of()
        assert len(graph.sites) == blocks and graph.after.count("all_reduce(") == graph.before.count("all_reduce(") == 1
        if not blocks:
            (miss,) = graph.near_misses
            assert "other ranks" in miss.reason and 'ep_implementation="moecompile"' in (miss.cure or "")


def check_explain_names_the_cure_for_all_to_all(rank: int, ranks: int) -> None:
    whole = build_model("qwen3_moe", torch.float32, "grouped_mm", ONE_LAYER)
    model, ids = in_parallel(whole, "all_to_all", shared=False), tokens_of(rank, 5)
    first = moecompile.explain(model, input_ids=ids, use_cache=False).graph_breaks[0]
    assert first.moe and first.source.startswith("expert_parallel.py")
    assert 'ep_implementation="moecompile"' in (first.cure or "") and "shard_experts" in (first.cure or "")


# ours


def check_ours_with_a_batch_for_each_rank(rank: int, ranks: int) -> None:
    moecompile.register_transformers()
    for name in ("qwen3_moe", "gpt_oss"):
        whole = build_model(name, torch.float32, "grouped_mm", ONE_LAYER)
        model, ids = in_parallel(whole, "moecompile", shared=False), tokens_of(rank, 5 + 2 * rank)
        right = summed(results(whole, whole, ids), model)
        close(results(model, model, ids), right, 1e-5)
        close(results(compiled(model), model, ids), right, 1e-5)
        checks_exchange(graph_of(), 1)


def check_ours_with_one_batch_for_all(rank: int, ranks: int) -> None:
    """Each rank computes a part of it: also of tokens that are no multiple of the ranks, or fewer."""
    moecompile.register_transformers()
    whole = build_model("qwen3_moe", torch.float32, "grouped_mm", ONE_LAYER)
    model = in_parallel(whole, "moecompile", shared=True)
    for count in (7, 1):
        ids = tokens_of(0, count)
        right = results(whole, whole, ids)
        close(results(model, model, ids), right, 1e-5)
        close(results(compiled(model, ep_capacity=4), model, ids), right, 1e-5)
        checks_exchange(graph_of(), 1)


def check_ours_as_users_load_it(rank: int, ranks: int) -> None:
    """With tensor parallelism, one graph; with FSDP, whose hooks break the graph around the experts."""
    from transformers.distributed import DistributedConfig

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    moecompile.register_transformers()
    path = [tempfile.mkdtemp() if rank == 0 else ""]
    distributed.broadcast_object_list(path)
    whole: Any = build_model("qwen3_moe", sizes=ONE_LAYER)
    if rank == 0:
        whole.save_pretrained(path[0])
    distributed.barrier()
    loaded: Any = model_class("qwen3_moe")
    for sizes in ({"tp_size": ranks}, {"fsdp_size": ranks}):
        config = DistributedConfig(**sizes, ep_size=ranks, ep_implementation="moecompile")
        model = loaded.from_pretrained(path[0], distributed_config=config, dtype=torch.float32).eval()
        ids = tokens_of(0 if "tp_size" in sizes else rank, 5)
        right = results(whole, whole, ids)
        right = meaned(right, whole) if "fsdp_size" in sizes else right
        run = torch.compile(model, backend="moecompile", options={"lowering": "eager"})
        moecompile.reset()
        close(results(run, model, ids), right, 1e-5)
        after = "".join(graph.after for graph in moecompile.last_report().graphs)
        assert after.count("dispatch_start") == 1 and "gather_experts" not in after
