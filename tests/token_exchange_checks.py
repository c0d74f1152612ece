"""What several ranks check together of models that exchange tokens themselves (tests/test_token_exchange.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn
from torch.utils import _pytree as pytree

import moecompile
from expert_parallel_models import close, local_of
from moecompile import agreement
from moecompile.options import Options
from moecompile.passes.detect import detect
from moecompile.passes.site import Detection
from moecompile.pipeline import run_passes
from moecompile.report import GraphReport
from token_exchange_models import (
    HIDDEN,
    NEVER_RUN,
    REFUSED,
    Checkpointed,
    Exchanging,
    LoopedExperts,
    OfDTensors,
    Remembering,
    ScaledByRank,
    Searched,
    SentTwice,
    SortedHere,
    Stacked,
    WeightedThere,
)

BOUND = 1.5e-2


def tokens_of(rank: int, count: int, hidden: int = HIDDEN) -> Tensor:
    """On every rank others."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(100 + rank))


def made(cls: type[nn.Module], *given: Any) -> nn.Module:
    """A model whose routers are the same on all ranks."""
    torch.manual_seed(3)
    return cls(*given)


def compiled(model: Callable[..., Any], dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    """By moecompile, with what the ranks agreed on before forgotten."""
    agreement.forget()
    moecompile.reset()
    torch._dynamo.reset()
    options = {"lowering": "eager"} | options
    return torch.compile(model, backend="moecompile", fullgraph=True, dynamic=dynamic, options=options)


def results(run: Callable[..., Any], model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of all parameters, of sharded ones this rank's."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = run(x)
    first, *others = out if isinstance(out, tuple) else (out,)
    sum(((each.float() ** 2).sum() for each in others), (first.float() ** 2).sum()).backward()
    grads = [each.grad for each in (x, *model.parameters())]
    found = [torch.zeros(1) if grad is None else grad for grad in grads]
    return [first.detach(), *(local_of(grad) if hasattr(grad, "to_local") else grad for grad in found)]


def by_passes(model: nn.Module) -> tuple[Callable[..., Any], list[GraphReport]]:
    """The model as the passes leave it, and their record once it runs: without AOTAutograd, for the sake of time."""
    records: list[GraphReport] = []

    def rewritten(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        records.append(GraphReport.of(gm))
        run_passes(gm, Options.parse(None, None), records[-1])
        found: Callable[..., Any] = gm.forward
        return found

    agreement.forget()
    torch._dynamo.reset()
    return torch.compile(model, backend=rewritten, fullgraph=True), records


def exchanges(model: nn.Module, x: Tensor, blocks: int = 1, **options: Any) -> str:
    """The compiled model exchanges its tokens by our operators, and computes the same; returns its graph."""
    right = results(model, model, x)
    close(results(compiled(model, **options), model, x), right, BOUND)
    (graph,) = moecompile.last_report().graphs
    is_exchanged(graph, blocks)
    return str(graph.after)


def exchanges_by_passes(model: nn.Module, x: Tensor) -> None:
    """The same of the graph that the passes leave."""
    right, (run, records) = results(model, model, x), by_passes(model)
    close(results(run, model, x), right, BOUND)
    (graph,) = records
    is_exchanged(graph)


def is_exchanged(graph: GraphReport, blocks: int = 1) -> None:
    assert not graph.near_misses, graph.near_misses
    assert len(graph.sites) == blocks and graph.after.count("dispatch_start") == blocks, graph.after
    for name in ("all_to_all_single", "wait_tensor", "item", "gather_experts", "grouped_mm"):
        assert name not in graph.after, f"{name} is left: {graph.after}"


def check_repeated_segments(rank: int, ranks: int) -> None:
    """Ranks with different numbers of tokens; the report says who exchanges, and how many."""
    exchanges(made(Exchanging), tokens_of(rank, 6 + 5 * rank))
    (note,) = [note for note in moecompile.last_report().graphs[0].notes if "exchange tokens" in note]
    assert f"{ranks} ranks share the experts" in note and f"at most {6 + 5 * (ranks - 1)} of each rank" in note


def check_searched_segments(rank: int, ranks: int) -> None:
    exchanges(made(Searched), tokens_of(rank, 9 - 2 * rank))


def check_weighted_there(rank: int, ranks: int) -> None:
    exchanges_by_passes(made(WeightedThere), tokens_of(rank, 5 + 2 * rank))


def check_looped_experts(rank: int, ranks: int) -> None:
    exchanges_by_passes(made(LoopedExperts), tokens_of(rank, 5 + 2 * rank))


def check_sorted_here(rank: int, ranks: int) -> None:
    exchanges_by_passes(made(SortedHere), tokens_of(rank, 5 + 2 * rank))


def check_shards_of_dtensors(rank: int, ranks: int) -> None:
    """What routing counts for others stays."""
    model: Any = made(OfDTensors)
    exchanges(model, tokens_of(rank, 7))
    assert int(model.load.sum()) == 2 * 7 * 2, "counted once eagerly, once compiled"


def check_two_blocks(rank: int, ranks: int) -> None:
    exchanges(made(Stacked), tokens_of(rank, 5 + rank), blocks=2)


def check_checkpointed(rank: int, ranks: int) -> None:
    exchanges(made(Checkpointed), tokens_of(rank, 5 + rank))


def check_exchanged_twice(rank: int, ranks: int) -> None:
    exchanges_by_passes(made(SentTwice), tokens_of(rank, 5 + rank))


def check_counts_that_others_need(rank: int, ranks: int) -> None:
    """How many rows came is looked at from outside: these numbers are still exchanged, the rows by our operators."""
    model: Any = made(Remembering)
    x = tokens_of(rank, 5 + rank)
    right, counts = model(x)
    found, same = compiled(model)(x)
    close([found], [right], BOUND)
    after = moecompile.last_report().graphs[0].after
    assert torch.equal(counts, same) and after.count("all_to_all_single") == 1 and "dispatch_start" in after


def check_explained(rank: int, ranks: int) -> None:
    """Where sizes that are read on the host break the graph, `explain` has tried what captures them."""
    text = str(moecompile.explain(made(Exchanging), tokens_of(rank, 5 + rank)))
    assert "fullgraph=True): tried, 1 block is found then" in " ".join(text.split()), text


def check_one_expert_a_rank(rank: int, ranks: int) -> None:
    exchanges_by_passes(made(Exchanging, ranks), tokens_of(rank, 4 + rank))


def check_a_rank_whose_experts_nobody_chooses(rank: int, ranks: int) -> None:
    model: Any = made(Exchanging)
    with torch.no_grad():
        model.router.weight[: model.here] *= 1e-3
        model.router.weight[model.here :] = model.router.weight[model.here :].abs()
    x = tokens_of(rank, 6).abs()
    graph = exchanges(model, x)
    assert "capacity=6" in graph
    assert rank or not model.w1.grad.any(), "nobody has chosen an expert of rank 0"


def check_a_rank_without_tokens(rank: int, ranks: int) -> None:
    """It proves nothing of its own rows, so all ranks leave the model as it is."""
    model, x = made(Exchanging), tokens_of(rank, 6 if rank else 0)
    right = model(x)
    assert torch.equal(compiled(model)(x), right)
    after = moecompile.last_report().graphs[0].after
    assert "all_to_all_single" in after and "dispatch_start" not in after


def check_dynamic_shapes(rank: int, ranks: int) -> None:
    """With `ep_capacity` one graph serves any number of tokens; without, the model's own exchange stays."""
    model = made(Exchanging)
    run = compiled(model, dynamic=True, ep_capacity=16)
    for count in (5, 9, 16):
        x = tokens_of(rank, count - rank)
        close([run(x)], [model(x)], BOUND)
    (graph,) = moecompile.last_report().graphs
    assert "dispatch_start" in graph.after and "all_to_all_single" not in graph.after
    x = tokens_of(rank, 5)
    assert torch.equal(compiled(model, dynamic=True)(x), model(x))
    (graph,) = moecompile.last_report().graphs
    (miss,) = graph.near_misses
    assert "symbolic" in miss.reason and "ep_capacity" in str(miss.cure) and "dispatch_start" not in graph.after


def check_disabled(rank: int, ranks: int) -> None:
    """Without the pass, on one rank of them alone, the model's own exchange stays on all."""
    model, x = made(Exchanging), tokens_of(rank, 5)
    run = compiled(model) if rank else compiled(model, disable=("exchange",))
    assert torch.equal(run(x), model(x))
    (graph,) = moecompile.last_report().graphs
    (miss,) = graph.near_misses
    assert ("not all ranks found it" if rank else "disabled") in miss.reason and "all_to_all_single" in graph.after


def check_verified(rank: int, ranks: int) -> None:
    """The option `verify` runs the block's own exchange beside ours, on all ranks."""
    exchanges(made(Exchanging), tokens_of(rank, 5 + rank), verify="first_call")
    (graph,) = moecompile.last_report().graphs
    assert len(graph.verify) == 1, graph.verify


def check_under_inductor(rank: int, ranks: int) -> None:
    exchanges(made(Exchanging), tokens_of(rank, 5 + rank), lowering="inductor")


def check_fp8(rank: int, ranks: int) -> None:
    """Experts are cast to FP8 where they are."""
    model, x = made(Exchanging, 8, 256, 128).bfloat16(), tokens_of(rank, 12 + rank, 256).bfloat16()
    right = results(model, model, x)
    found = results(compiled(model, precision="fp8"), model, x)
    (graph,) = moecompile.last_report().graphs
    assert "experts_fp8" in graph.after and "dispatch_start" in graph.after, graph.after
    close(found[:2], right[:2], 8e-2)  # output, and the gradient of tokens; of matrices FP8 gives noisier ones


class Stop(Exception):
    """Ends a compilation."""


def found_in(model: nn.Module, x: Tensor) -> Detection:
    """What detection finds in the graph, which nobody runs."""
    found: list[Detection] = []

    def look(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(detect(gm.graph))
        raise Stop

    torch._dynamo.reset()
    with contextlib.suppress(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(model, backend=look, fullgraph=True)(x)
    return found[0]


def check_never_run(rank: int, ranks: int) -> None:
    """Places and numbers that are almost right: nothing is found in them, though like ones are."""
    for cls in (Exchanging, Searched, *NEVER_RUN):
        found = found_in(made(cls), tokens_of(rank, 5 + rank))
        assert len(found.sites) == (cls not in NEVER_RUN), f"{cls.__name__}: {found}"
        assert bool(found.near_misses) == (cls in NEVER_RUN), f"{cls.__name__}: {found}"


def check_refused(rank: int, ranks: int) -> None:
    """Left as they are: bit for bit what they are eagerly, and a near miss with the reason."""
    failed = []
    for cls, words in REFUSED.items():
        model, x = made(cls), tokens_of(rank, 5 + 2 * rank).requires_grad_()
        right, (run, records) = model(x), by_passes(model)
        found, (record,) = run(x), records
        reasons = [miss.reason for miss in record.near_misses]
        distributed.barrier()
        if not all(map(torch.equal, pytree.tree_leaves(found), pytree.tree_leaves(right))):
            failed.append(f"{cls.__name__}: another result; {reasons}")
        if record.sites or "dispatch_start" in record.after or "all_to_all_single" not in record.after:
            failed.append(f"{cls.__name__}: was rewritten")
        if not any(words in reason for reason in reasons):
            failed.append(f"{cls.__name__}: {reasons}")
    assert not failed, "\n".join(failed)


def check_refused_gradients(rank: int, ranks: int) -> None:
    """What is left as it is has its gradients."""
    model, x = made(ScaledByRank), tokens_of(rank, 5 + 2 * rank)
    right, found = results(model, model, x), results(compiled(model), model, x)
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))
