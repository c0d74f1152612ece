"""Exchanges that are hidden behind the experts, what ranks check together (tests/test_hidden_exchange.py)."""

from __future__ import annotations

import contextlib
import copy
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

import moecompile
import moecompile.ranks as ranks_module
from expert_parallel_models import (
    MANY,
    TOP_K,
    Experts,
    Model,
    close,
    compiled,
    hide_as_on_gpus,
    mesh_of,
    tokens_of,
)
from moecompile.agreement import DisagreementError
from moecompile.runtime import peer_memory

hide_as_on_gpus()


def graph_text() -> str:
    """Of the last graph that was compiled, rewritten."""
    return moecompile.last_report().graphs[-1].after


def compare(rank: int, ranks: int, counts: list[int], bound: float, hidden: int = 64, **options: object) -> None:
    """Hidden, one step after the other, which is the same unless Inductor writes experts out, and the whole model."""
    model = Model(hidden, hidden // 2, fixed=True)
    whole, x = copy.deepcopy(model), tokens_of(rank, counts[rank], hidden=hidden)
    moecompile.shard_experts(model, mesh_of(ranks))
    with torch.no_grad():
        found = compiled(model, **options)(x)
        (graph,) = moecompile.last_report().graphs
        assert "moecompile.exchanged_experts" in graph.after and "dispatch_start" not in graph.after
        assert "2 of 2 exchanges are hidden behind the experts" in graph.notes
        after = compiled(model, disable=("hide",), **options)(x)
        assert torch.equal(found, after) or options.get("lowering") == "inductor"
        assert "exchanged_experts" not in graph_text() and "dispatch_start" in graph_text()
        right = compiled(whole, **options)(x) if "precision" in options else whole(x)
        close([found, after], [right] * 2, bound)


def check_hidden(rank: int, ranks: int) -> None:
    compare(rank, ranks, [MANY] * ranks, 8e-3)


def check_hidden_in_fp8(rank: int, ranks: int) -> None:
    compare(rank, ranks, [MANY] * ranks, 8e-3, hidden=256, precision="fp8")


def check_hidden_by_inductor(rank: int, ranks: int) -> None:
    compare(rank, ranks, [MANY] * ranks, 8e-3, lowering="inductor")


def check_ranks_with_few_tokens_do_as_the_others(rank: int, ranks: int) -> None:
    """What decides is the most that any has."""
    compare(rank, ranks, [MANY, *range(ranks - 1)], 8e-3)


def check_cached_copies(rank: int, ranks: int) -> None:
    compare(rank, ranks, [MANY] * ranks, 8e-3, hidden=256, precision="fp8", fp8_cache_weights=True)


def check_few_tokens_are_not_hidden(rank: int, ranks: int) -> None:
    model, x = Model(fixed=True), tokens_of(rank, MANY - 1)
    moecompile.shard_experts(model, mesh_of(ranks))
    with torch.no_grad():
        found = compiled(model)(x)
        assert "exchanged_experts" in graph_text() and "dispatch_start" not in graph_text()
        assert "hidden" not in str(moecompile.last_report().graphs[-1].notes)
        assert torch.equal(found, compiled(model, disable=("hide",))(x))


def check_nothing_is_hidden_where_there_are_gradients(rank: int, ranks: int) -> None:
    """One operator all the same."""
    model = Model(fixed=True)
    moecompile.shard_experts(model, mesh_of(ranks))
    run = compiled(model)
    run(tokens_of(rank, MANY)).sum().backward()
    assert "exchanged_experts" in graph_text() and "hidden" not in str(moecompile.last_report().graphs[-1].notes)
    with torch.no_grad():  # and later is, with an agreement of its own
        run(tokens_of(rank, MANY))
    assert "2 of 2 exchanges are hidden" in str(moecompile.last_report().graphs[-1].notes)


def check_ranks_that_send_other_things_disagree(rank: int, ranks: int) -> None:
    model = Model(256, 128, fixed=True)
    moecompile.shard_experts(model, mesh_of(ranks))
    for options in ({"precision": "fp8" if rank else "model"}, {"disable": ("hide",) if rank else ()}):
        (name,) = options
        said = ""
        with torch.no_grad():
            try:
                compiled(model, **options)(tokens_of(rank, MANY, hidden=256))
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
        assert DisagreementError.__name__ in said and f"option `{name}`" in said, said


def check_rows_that_there_is_no_room_for(rank: int, ranks: int) -> None:
    """All tokens meet experts of one rank: nobody gets a number, and no optimizer goes on there."""
    count, model = 4096, Experts()
    whole, x = copy.deepcopy(model), tokens_of(rank, count)
    ids, weights = torch.arange(TOP_K).expand(count, TOP_K).contiguous(), torch.ones(count, TOP_K)
    moecompile.shard_experts(model, mesh_of(ranks))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            run = compiled(model, ep_rows=1.0)
            y = run(x, ids, weights)
            assert bool(y.isnan().all()) and "exchanged_experts" in graph_text()
        if gradients:
            y.sum().backward()
        if rank == 0:
            with contextlib.suppress(RuntimeError):
                optimizer.step()
                raise AssertionError("a step was taken")
            (why,) = peer_memory._given_up
            assert (
                f"{ranks * count * TOP_K} assignments met experts of rank 0, which have room for {count * TOP_K}" in why
            )
            peer_memory._given_up.clear()
        with torch.set_grad_enabled(gradients):
            close([compiled(model, ep_rows=float(ranks))(x, ids, weights)], [whole(x, ids, weights)], 8e-3)


def check_ranks_that_cast_other_layers_disagree(rank: int, ranks: int) -> None:
    """What travels would be read as something else: at once, and when one rank compiles again with other options."""
    # by names of its own: ranks count their meetings, and one will be missed
    model, many = nn.Sequential(Model(256, 128, fixed=True)), tokens_of(rank, MANY, hidden=256)
    moecompile.shard_experts(model, mesh_of(ranks))

    def said(**options: Any) -> str:
        with torch.no_grad():
            try:
                torch._dynamo.reset()
                torch.compile(model, backend="moecompile", fullgraph=True, options=dict(lowering="eager", **options))(
                    many
                )
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        return ""

    compiled(model)  # nothing has been agreed on
    assert "option `fp8_exclude`" in said(precision="fp8", fp8_exclude=("0.blocks.0.experts",) if rank else ())
    assert not said() and not said(precision="fp8"), "all of them may change their minds"
    patience, ranks_module.PATIENCE = ranks_module.PATIENCE, timedelta(seconds=3)
    if rank == 0:
        assert "not all of the ranks" in said(precision="model")
    distributed.barrier()
    ranks_module.PATIENCE = patience
