"""What several ranks check together of the option `verify` (tests/test_verified_exchange.py)."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import moecompile
import token_exchange_checks
import zoo_forms
from expert_parallel_models import (
    HIDDEN,
    MANY,
    Block,
    Model,
    close,
    compiled,
    hide_as_on_gpus,
    mesh_of,
    results,
    tokens_of,
)
from moecompile import pieces
from moecompile.agreement import DisagreementError
from moecompile.passes import expert_parallel, fuse
from moecompile.passes.detect import detect
from moecompile.passes.hide import Rewritten
from moecompile.passes.site import Detection, Site
from moecompile.report import GraphReport
from token_exchange_models import Exchanging
from zoo_case import Case, make

hide_as_on_gpus()
verified = functools.partial(compiled, verify="first_call")
WRONG = "mul(sigmoid(gate), up)"
AGAIN = "not verified again"
UNDONE = "the original runs, and all ranks that share experts gather them"


def sharded(ranks: int, model: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """The model over all ranks, and as it is."""
    model = Model(fixed=True) if model is None else model
    whole = copy.deepcopy(model)
    return moecompile.shard_experts(model, mesh_of(ranks)), whole


def graphs() -> tuple[GraphReport, ...]:
    return moecompile.last_report().graphs


def passed(graph: GraphReport, blocks: int, gradients: bool, exchange: str = "exchanged_experts") -> None:
    """All blocks were compared, none differed, and their tokens are exchanged."""
    assert len(graph.verify) == len(graph.sites) == blocks, graph.verify
    assert all(("gradients by" in line) == gradients for line in graph.verify), graph.verify
    assert exchange in graph.after and "gather_experts" not in graph.after, graph.after


def undone(graph: GraphReport) -> None:
    """The model's own code runs, on gathered experts, and the report says so."""
    assert not graph.sites and not graph.casts, graph.sites
    assert "gather_experts" in graph.after and "moecompile.experts" not in graph.after, graph.after
    assert "dispatch_start" not in graph.after and "exchanged_experts" not in graph.after, graph.after
    assert any(UNDONE in note for note in graph.notes), graph.notes
    assert not any("exchange tokens" in note or "hidden" in note for note in graph.notes), graph.notes


def experts_activated_wrongly(block: Any, *given: Any) -> fx.Node:
    """As the pass `exchange` writes the experts of a rank, but for their activation."""
    node = EXPERTS_HERE(block, *given)
    node.kwargs = {**node.kwargs, "activation": WRONG}
    return node


EXPERTS_HERE: Callable[..., fx.Node] = expert_parallel._Block._experts
EMIT, HIDE = fuse.emit, pieces.hide_exchanges


def emitted_wrongly(graph: fx.Graph, site: Site) -> fx.Node:
    """As the pass `fuse` writes a block, but for its activation."""
    node = EMIT(graph, site)
    node.kwargs = {**node.kwargs, "activation": WRONG}
    return node


def hidden_wrongly(graph: fx.Graph, differentiable: bool) -> Rewritten:
    """As the pass `hide` writes blocks, but for their activation."""
    found = HIDE(graph, differentiable)
    for node in graph.find_nodes(op="call_function", target=torch.ops.moecompile.exchanged_experts.default):
        node.kwargs = {**node.kwargs, "activation": WRONG}
    return found


@contextlib.contextmanager
def broken(place: Any, name: str, wrong: Callable[..., Any]) -> Iterator[None]:
    with mock.patch.object(place, name, wrong):
        yield


WRONG_FUSE = functools.partial(broken, fuse, "emit", emitted_wrongly)
WRONG_EXCHANGE = functools.partial(broken, expert_parallel._Block, "_experts", experts_activated_wrongly)
WRONG_HIDE = functools.partial(broken, pieces, "hide_exchanges", hidden_wrongly)


def check_right_exchanges_pass(rank: int, ranks: int) -> None:
    """Ranks with different numbers of tokens, the last with none."""
    for made, counts, blocks in ((Model(fixed=True), [5, 6], 2), (Block(), [7, 0], 1)):
        model, _ = sharded(ranks, made)
        torch._dynamo.reset()
        results(verified(model), model, tokens_of(rank, counts[min(rank, 1)]))
        passed(graphs()[0], blocks, gradients=True)


def check_right_operators_one_after_the_other_pass(rank: int, ranks: int) -> None:
    model, _ = sharded(ranks)
    results(verified(model, disable=("hide",)), model, tokens_of(rank, 5 + rank))
    passed(graphs()[0], 2, gradients=True, exchange="dispatch_start")


def check_right_exchanges_in_fp8_pass(rank: int, ranks: int) -> None:
    """Compared before they are cast."""
    model, _ = sharded(ranks, Model(256, 128, fixed=True))
    results(verified(model, precision="fp8"), model, tokens_of(rank, 5 + rank, hidden=256))
    passed(graphs()[0], 2, gradients=True)
    assert "quantize_weights" in graphs()[0].after


def check_right_hidden_exchanges_pass(rank: int, ranks: int) -> None:
    for size, options in ((HIDDEN, {}), (256, {"precision": "fp8"})):
        model, _ = sharded(ranks, Model(size, size // 2, fixed=True))
        torch._dynamo.reset()
        with torch.no_grad():
            verified(model, **options)(tokens_of(rank, MANY - 10 * rank, hidden=size))
        passed(graphs()[0], 2, gradients=False)


def check_right_exchanges_in_bodies_pass(rank: int, ranks: int) -> None:
    """Inside checkpointed regions; and inside a checkpoint around it all, whose hooks do not see what is compared."""

    class Checkpointed(Model):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                made: Any = checkpoint(block, x, use_reentrant=False)
                x = x + made
            return self.last(self.first(x))

    model, _ = sharded(ranks, Checkpointed())
    results(verified(model), model, tokens_of(rank, 5 + rank))
    passed(graphs()[0], 2, gradients=True)
    torch._dynamo.reset()
    run = verified(model)
    results(lambda x: checkpoint(run, x, use_reentrant=False), model, tokens_of(rank, 5 + rank))
    passed(graphs()[0], 2, gradients=True)


def compares(rank: int, ranks: int, case: Case) -> None:
    """What is rewritten of a case passes, gradients included."""
    try:
        model, _ = sharded(ranks, make(case))
    except ValueError:  # experts that are no stacks
        return
    torch._dynamo.reset()
    found = verified(model)(*case.inputs(24))
    first = found[0] if isinstance(found, tuple) else found
    first.float().square().sum().backward()
    for graph in graphs():
        assert len(graph.verify) == len(graph.sites), f"{case.name}: {graph.verify}"
        assert all("gradients by" in line for line in graph.verify), f"{case.name}: {graph.verify}"


def check_other_forms_pass(rank: int, ranks: int) -> None:
    """Biases, which every rank has whole; loops, which read experts several times and gather."""
    for name in ("grouped_control", "nonzero_index_put"):
        compares(rank, ranks, zoo_forms.case(name))
        (graph,) = graphs()
        assert graph.sites and ("exchanged_experts" in graph.after) == (name == "grouped_control"), name


def check_all_forms_pass(rank: int, ranks: int) -> None:
    for case in zoo_forms.CASES:
        compares(rank, ranks, case)


def check_wrong_exchanges_are_undone(rank: int, ranks: int) -> None:
    """What is wrong with the exchange alone, in training and, hidden, in inference."""
    model, whole = sharded(ranks)
    x = tokens_of(rank, 5 + rank)
    for wrong in (WRONG_EXCHANGE, WRONG_HIDE):
        torch._dynamo.reset()
        with wrong():
            found = results(verified(model), model, x)
        close(found[:2], results(whole, whole, x)[:2], 6e-3)
        undone(graphs()[0])
        assert all("gradients by" in line for line in graphs()[0].verify)
    x = tokens_of(rank, MANY)
    torch._dynamo.reset()
    with torch.no_grad(), WRONG_HIDE():
        close([verified(model)(x)], [whole(x)], 6e-3)
    undone(graphs()[0])


def check_what_one_rank_rewrites_wrongly_is_undone_on_all(rank: int, ranks: int) -> None:
    """Also when it is compiled once more, by one of them alone."""
    model, whole = sharded(ranks)
    with WRONG_FUSE() if rank == ranks - 1 else contextlib.nullcontext(), torch.no_grad():
        run = verified(model)
        for count in (9, 9 - rank):
            x = tokens_of(rank, count)
            close([run(x)], [whole(x)], 6e-3)
    assert len(graphs()) == (2 if rank else 1)
    for graph in graphs():
        undone(graph)
    assert not rank or any("when the ranks first compiled" in note for note in graphs()[1].notes)


def check_wrong_casts_are_forgotten(rank: int, ranks: int) -> None:
    """What is undone is not cast either, and nobody says that it was."""
    model, whole = sharded(ranks, Model(256, 128, fixed=True))
    x = tokens_of(rank, 12, hidden=256)
    with torch.no_grad(), WRONG_EXCHANGE():
        close([verified(model, precision="fp8", fp8_compare="first_call")(x)], [whole(x)], 6e-3)
    undone(graphs()[0])
    assert not graphs()[0].compared


def check_who_compiles_alone_verifies_nothing(rank: int, ranks: int) -> None:
    """To verify, a rank would wait for the others: it says so, and goes on as all have agreed."""
    for more in ({}, {"disable": ("exchange",)}):
        model, whole = sharded(ranks)
        torch._dynamo.reset()
        with torch.no_grad():
            run = verified(model, **more)
            for count in (9, 9 - rank):
                x = tokens_of(rank, count)
                close([run(x)], [whole(x)], 1e-2)
        first, *others = graphs()
        assert len(first.verify) == 2 and len(others) == (rank > 0)
        assert all(not graph.verify and any(AGAIN in note for note in graph.notes) for graph in others)


def check_who_compares_with_fp8_alone(rank: int, ranks: int) -> None:
    """The option `fp8_compare` runs the graph, too."""
    model, _ = sharded(ranks, Model(256, 128, fixed=True))
    with torch.no_grad():
        run = compiled(model, precision="fp8", fp8_compare="first_call")
        for count in (9, 9 - rank):
            run(tokens_of(rank, count, hidden=256))
    first, *others = graphs()
    assert first.compared and len(others) == (rank > 0)
    assert all(not graph.compared and any("precision again" in note for note in graph.notes) for graph in others)


def check_ranks_that_are_not_asked_alike(rank: int, ranks: int) -> None:
    """Who verifies waits for who does not: all refuse."""
    model, _ = sharded(ranks, Model(256, 128, fixed=True))
    for name, more in (("verify", {}), ("fp8_compare", {"precision": "fp8"})):
        said = ""
        torch._dynamo.reset()
        try:
            compiled(model, **more, **({name: "first_call"} if rank else {}))(tokens_of(rank, 4, hidden=256))
        except Exception as error:
            said = str(error)
        assert DisagreementError.__name__ in said and f"option `{name}`" in said, said


def check_blocks_that_not_all_ranks_find(rank: int, ranks: int) -> None:
    """They are compared where they are found; who has found none runs the graph with the others."""

    def nothing(graph: fx.Graph) -> Detection:
        found = detect(graph)
        return Detection((), (), found.layout)

    model, whole = sharded(ranks)
    x = tokens_of(rank, 5 + rank)
    with broken(pieces, "detect", nothing) if rank else contextlib.nullcontext():
        close(results(verified(model), model, x)[:2], results(whole, whole, x)[:2], 1e-2)
    (graph,) = graphs()
    assert len(graph.verify) == len(graph.sites) == (0 if rank else 2) and "gather_experts" in graph.after


def check_models_that_exchange_themselves(rank: int, ranks: int) -> None:
    """What a model exchanges by itself is compared with our exchange, and stays where that is wrong."""
    model, x = token_exchange_checks.made(Exchanging), token_exchange_checks.tokens_of(rank, 5 + rank)
    for wrong in (False, True):
        with WRONG_EXCHANGE() if wrong else contextlib.nullcontext():
            run = token_exchange_checks.compiled(model, verify="first_call")
            right = token_exchange_checks.results(model, model, x)
            close(token_exchange_checks.results(run, model, x), right, token_exchange_checks.BOUND)
        (graph,) = graphs()
        assert len(graph.verify) == 1 and len(graph.sites) == (not wrong), graph.verify
        assert ("all_to_all_single" in graph.after) == wrong and ("exchanged_experts" in graph.after) != wrong
