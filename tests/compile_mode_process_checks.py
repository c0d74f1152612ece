"""Modes of torch.compile that need a GPU, what ranks on one check together (tests/test_compile_modes_gpu.py)."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees

import moecompile
from exchange_process_checks import HIDDEN, INNER, MANY, mesh_of, results
from expert_parallel_models import Model, close, compiled, tokens_of
from moecompile import agreement
from moecompile.runtime import peer_memory

TURNS = 8
"""The first calls warm up and record, the others replay."""


def sharded(ranks: int) -> tuple[nn.Module, nn.Module]:
    """A model over all ranks, and as it is."""
    model, mesh = Model(HIDDEN, INNER, fixed=True).cuda(), mesh_of(ranks)
    whole = copy.deepcopy(model)
    moecompile.shard_experts(model, mesh, src_data_rank=None)  # gloo scatters nothing of a GPU's
    return model, whole


def in_mode(model: nn.Module, mode: str) -> Callable[..., Tensor]:
    """By Inductor, with what was compiled and agreed on before forgotten."""
    torch._dynamo.reset()
    agreement.forget()
    moecompile.reset()
    counters.clear()
    return torch.compile(model, backend="moecompile", mode=mode, fullgraph=True)


def come_late() -> None:
    """Now and then."""
    if random.random() < 0.4:
        time.sleep(random.random() / 20)


def captured() -> None:
    """Inductor has made CUDA graphs of all there was, and our kernels have carried the tokens."""
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager
    assert manager is not None and manager.new_graph_id().id > 0, "nothing was captured"
    assert peer_memory._memories, "no kernel has exchanged anything"


def inference(rank: int, ranks: int, mode: str, tokens: int) -> None:
    """Other tokens in every call, which ranks make when they like."""
    model, whole = sharded(ranks)
    inputs = [tokens_of(10 * turn + rank, tokens, hidden=HIDDEN).cuda() for turn in range(TURNS)]
    with torch.no_grad():
        right = [compiled(whole)(x) for x in inputs]
        run = in_mode(model, mode)
        for x, wanted in zip(inputs, right, strict=True):
            come_late()
            torch.compiler.cudagraph_mark_step_begin()
            close([run(x)], [wanted], 1.5e-2)
    (graph,) = moecompile.last_report().graphs
    assert "exchanged_experts" in graph.after and "gather_experts" not in graph.after


def check_reduced_overhead(rank: int, ranks: int) -> None:
    inference(rank, ranks, "reduce-overhead", 160)
    captured()


def check_reduced_overhead_of_hidden_exchanges(rank: int, ranks: int) -> None:
    """Graphs of two streams."""
    inference(rank, ranks, "reduce-overhead", MANY)
    captured()


def check_reduced_overhead_in_training(rank: int, ranks: int) -> None:
    """Forward and backward are graphs of their own, on ranks with different numbers of tokens."""
    model, _ = sharded(ranks)
    inputs = [tokens_of(10 * turn + rank, 200 - 20 * rank, hidden=HIDDEN).cuda() for turn in range(TURNS)]
    shown = compiled(model)
    right = [[each.clone() for each in results(shown, model, x)] for x in inputs]
    run = in_mode(model, "reduce-overhead")
    for x, wanted in zip(inputs, right, strict=True):
        come_late()
        torch.compiler.cudagraph_mark_step_begin()
        close(results(run, model, x), wanted, 1.5e-2)
    captured()
    (graph,) = moecompile.last_report().graphs
    assert "exchanged_experts" in graph.after and "gather_experts" not in graph.after


def check_max_autotune(rank: int, ranks: int) -> None:
    inference(rank, ranks, "max-autotune", 160)
    captured()


def check_max_autotune_without_cuda_graphs(rank: int, ranks: int) -> None:
    inference(rank, ranks, "max-autotune-no-cudagraphs", 160)


def check_verified(rank: int, ranks: int) -> None:
    """The option `verify` runs the exchange's kernels while it compiles, hidden or not."""
    model, _ = sharded(ranks)
    x = tokens_of(rank, 200 - 20 * rank, hidden=HIDDEN).cuda()
    results(compiled(model, verify="first_call"), model, x)
    torch._dynamo.reset()  # or sizes become symbols
    with torch.no_grad():
        compiled(model, verify="first_call")(tokens_of(rank, MANY, hidden=HIDDEN).cuda())
    (graph,) = moecompile.last_report().graphs
    assert len(graph.verify) == len(graph.sites) == 2 and "exchanged_experts" in graph.after, graph.verify
    assert peer_memory._memories, "no kernel has exchanged anything"
