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
from expert_parallel_models import close, compiled, meaned, mesh_of, with_mean_of_others
from moecompile import agreement
from moecompile.report import GraphReport
from tiny_sizes import Sizes
from tiny_transformers import build_model, model_class

ONE_LAYER = Sizes(layers=1)


def results(run: Callable[..., Any], model: nn.Module, given: Tensor) -> list[Tensor]:
    """What a model or a block gives, and gradients of all its parameters, those of sharded ones whole."""
    model.zero_grad()
    out = tensor_of(run(given))
    (out.float() ** 2).mean().backward()
    found = [out.detach()]
    for parameter in model.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append(grad.full_tensor() if isinstance(grad, DTensor) else grad)
    return found


def tensor_of(out: Any) -> Tensor:
    """Logits of a model, hidden states of a block."""
    out = getattr(out, "logits", out)
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def model_of(name: str, dtype: torch.dtype = torch.float32, implementation: str = "grouped_mm") -> Any:
    """A whole model of one layer, on every rank the same."""
    model: Any = build_model(name, dtype, implementation, ONE_LAYER)
    model.config.use_cache = False
    return model


def block_of(model: Any) -> Any:
    """Router and experts of its layer."""
    return model.model.layers[0].mlp


def ids_of(seed: int, count: int) -> Tensor:
    """One sequence."""
    return torch.randint(3, 256, (1, count), generator=torch.Generator().manual_seed(seed))


def tokens_of(seed: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a block is given."""
    return torch.randn(1, count, ONE_LAYER.hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


def sharded(model: Any, part: Callable[[Any], Any], given: Tensor, ranks: int) -> None:
    """Eager and compiled, forward and backward, as the whole model."""
    exact = given.dtype != torch.bfloat16
    whole = part(copy.deepcopy(model))
    moecompile.shard_experts(model, mesh_of(ranks))
    model = part(model)
    right = meaned(results(whole, whole, given), whole)
    eager = with_mean_of_others(results(model, model, given), model)
    assert torch.equal(eager[0], right[0])
    close(eager, right, 1e-5 if exact else 1e-2)
    close(with_mean_of_others(results(compiled(model), model, given), model), right, 1e-5 if exact else 3e-2)
    checks_exchange(graph_of(), 1)


def check_whole_models_sharded(rank: int, ranks: int) -> None:
    """Ranks have different numbers of tokens. Biases of gpt-oss, of two dimensions, stay whole on every rank."""
    for name in ("gpt_oss", "deepseek_v3"):
        sharded(model_of(name), lambda model: model, ids_of(rank, 6 + 3 * rank), ranks)


def check_bfloat16_sharded(rank: int, ranks: int) -> None:
    sharded(model_of("qwen3_moe", torch.bfloat16), block_of, tokens_of(rank, 6 + 3 * rank, torch.bfloat16), ranks)


def check_batched_products_sharded(rank: int, ranks: int) -> None:
    sharded(model_of("gpt_oss", implementation="batched_mm"), block_of, tokens_of(rank, 6 + 3 * rank), ranks)


def check_a_loop_that_breaks_the_graph_does_not_hang(rank: int, ranks: int) -> None:
    """Ranks run the loop's turns another number of times, each in graphs of its own."""
    model = model_of("qwen3_moe", implementation="eager")
    whole, x = block_of(copy.deepcopy(model)), tokens_of(rank, 1 + 5 * rank)
    moecompile.shard_experts(model, mesh_of(ranks))
    block = block_of(model)
    right = meaned(results(whole, whole, x), whole)
    moecompile.reset()
    run = torch.compile(block, backend="moecompile", options={"lowering": "eager"})
    close(with_mean_of_others(results(run, block, x), block), right, 1e-5)
    assert all("gather_experts" not in graph.after for graph in moecompile.last_report().graphs)


# transformers' own forms


def check_all_reduce_computes_what_it_did(rank: int, ranks: int) -> None:
    """Whether or not the local part is rewritten: the ranks' parts are summed once."""
    for implementation, blocks in (("grouped_mm", 0), ("batched_mm", 1)):
        model = model_of("qwen3_moe", implementation=implementation)
        whole, block, x = block_of(model), block_of(in_parallel(model, "all_reduce", shared=True)), tokens_of(0, 5)
        close(results(compiled(block, expert_load=True), block, x), results(whole, whole, x), 1e-5)
        assert len(graph_of().sites) == blocks
        # other ranks' experts are one of this rank's there, with a weight of 0
        assert moecompile.expert_load(block) == {}
        assert any(note.startswith("expert_load: ") for note in graph_of().notes)
        with torch.no_grad():
            close([compiled(block)(x)], [whole(x)], 1e-5)
        graph = graph_of()
        assert len(graph.sites) == blocks and graph.after.count("all_reduce(") == graph.before.count("all_reduce(") == 1
        if not blocks:
            (miss,) = graph.near_misses
            assert "other ranks" in miss.reason and 'ep_implementation="moecompile"' in (miss.cure or "")


def check_explain_names_the_cure_for_all_to_all(rank: int, ranks: int) -> None:
    block = block_of(in_parallel(model_of("qwen3_moe"), "all_to_all", shared=False))
    first = moecompile.explain(block, tokens_of(rank, 5)).graph_breaks[0]
    assert first.moe and first.source.startswith("expert_parallel.py")
    assert 'ep_implementation="moecompile"' in (first.cure or "") and "shard_experts" in (first.cure or "")


# ours


def check_ours_with_a_batch_for_each_rank(rank: int, ranks: int) -> None:
    moecompile.register_transformers()
    for name in ("qwen3_moe", "gpt_oss"):
        model = model_of(name)
        whole, block = block_of(model), block_of(in_parallel(model, "moecompile", shared=False))
        x = tokens_of(rank, 5 + 2 * rank)
        right = summed(results(whole, whole, x), block)
        close(results(block, block, x), right, 1e-5)
        close(results(compiled(block, expert_load=True), block, x), right, 1e-5)
        checks_exchange(graph_of(), 1)
        (load,) = moecompile.expert_load(block).values()
        assert load.shape == whole.experts.gate_up_proj.shape[:1]
        assert int(load.sum()) == x.shape[1] * model.config.num_experts_per_tok


def check_ours_as_transformers_all_to_all(rank: int, ranks: int) -> None:
    """The same numbers and gradients, eagerly, also on a rank without tokens."""
    moecompile.register_transformers()
    model, x = model_of("qwen3_moe"), tokens_of(rank, 4 * rank)
    theirs, ours = (block_of(in_parallel(model, name, shared=False)) for name in ("all_to_all", "moecompile"))
    close([tensor_of(ours(x))], [tensor_of(theirs(x))], 1e-5)


def check_ours_with_one_batch_for_all(rank: int, ranks: int) -> None:
    """Each rank computes a part of it: of tokens that are no multiple of the ranks, of symbolic size, or one token."""
    moecompile.register_transformers()
    model = model_of("qwen3_moe")
    whole, block = block_of(model), block_of(in_parallel(model, "moecompile", shared=True))
    for count in (7, 5, 1):
        x = tokens_of(0, count)
        right = results(whole, whole, x)
        close(results(block, block, x), right, 1e-5)
        close(results(compiled(block, ep_capacity=4, expert_load=True), block, x), right, 1e-5)
        checks_exchange(graph_of(), 1)
        try:
            moecompile.expert_load(block)
        except RuntimeError as error:
            assert "parts of the same tokens that may overlap" in str(error), error
        else:
            raise AssertionError("what these ranks count does not add up")


def check_ours_as_users_load_it(rank: int, ranks: int) -> None:
    """With tensor parallelism, one graph; with FSDP, whose hooks break the graph around the experts."""
    from transformers.distributed import DistributedConfig

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    moecompile.register_transformers()
    path = [tempfile.mkdtemp() if rank == 0 else ""]
    distributed.broadcast_object_list(path)
    whole, loaded = model_of("qwen3_moe"), model_class("qwen3_moe")
    if rank == 0:
        whole.save_pretrained(path[0])
    distributed.barrier()
    for sizes in ({"tp_size": ranks}, {"fsdp_size": ranks}):
        config = DistributedConfig(**sizes, ep_size=ranks, ep_implementation="moecompile")
        model = loaded.from_pretrained(path[0], distributed_config=config, dtype=torch.float32).eval()  # type: ignore[attr-defined]
        model.config.use_cache = False
        ids = ids_of(0 if "tp_size" in sizes else rank, 5)
        right = results(whole, whole, ids)
        right = meaned(right, whole) if "fsdp_size" in sizes else right
        agreement.forget()
        moecompile.reset()
        run = torch.compile(model, backend="moecompile", options={"lowering": "eager"})
        close(results(run, model, ids), right, 1e-5)
        after = "".join(graph.after for graph in moecompile.last_report().graphs)
        assert after.count("dispatch_start") == 1 and "gather_experts" not in after
