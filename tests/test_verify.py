"""verify="first_call": right rewrites pass, wrong ones are caught, named and undone, and nothing else changes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import moecompile
import zoo_forms
from moecompile import ranks
from moecompile.passes import fuse
from moecompile.passes.site import Site
from ranks_in_processes import start_ranks
from small_models import HIDDEN, Layer, Model, assert_same, compiled, inputs
from zoo_case import make

verified = functools.partial(compiled, verify="first_call")
Break = Callable[..., None]


@pytest.fixture
def break_fuse(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Makes `fuse` emit something else for the block of one layer."""
    emit = fuse.emit

    def break_it(change: Callable[[Site], Site], layer: int = 0) -> None:
        def wrong(graph: fx.Graph, site: Site) -> fx.Node:
            return emit(graph, change(site) if site.module.startswith(f"layers.{layer}") else site)

        monkeypatch.setattr(fuse, "emit", wrong)

    return break_it


def wrong_gradient(x: Tensor) -> Tensor:
    """The same value, with 1.01 times its gradient."""
    return 1.01 * x - 0.01 * x.detach()


def graph() -> Any:
    (only,) = moecompile.last_report().graphs
    return only


def without_weights(site: Site) -> Site:
    return dataclasses.replace(site, output="out")


@pytest.mark.parametrize("around", [None, functools.partial(checkpoint, use_reentrant=False)], ids=["plain", "body"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_right_rewrites_pass(around: Any, dynamic: bool | None, caplog: Any):
    model = Model(around=around)
    assert_same(model, verified(model, dynamic=dynamic), inputs())
    assert len(graph().sites) == len(graph().verify) == 2
    assert all("results differ by" in line and "gradients by" in line for line in graph().verify)
    assert not [record for record in caplog.records if record.name == "moecompile"]


def test_inference_compares_results_only():
    with torch.no_grad():
        verified(Model())(inputs())
    assert len(graph().verify) == 2 and not any("gradients" in line for line in graph().verify)


# In-place biases, a sum into the shared expert, a table of weights, writes row by row, padding.
OTHER_FORMS = ["interleaved_biased", "shared_first", "stacked_experts", "equality_set_item", "padded_gather"]


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_right_rewrites_of_other_forms_pass(name: str):
    case = zoo_forms.case(name)
    verified(make(case), fullgraph=case.fullgraph)(*case.inputs(24))
    assert len(graph().sites) == len(graph().verify) == 1
    assert "gradients by" in graph().verify[0]


def test_a_wrong_rewrite_is_caught_named_and_undone(break_fuse: Break, caplog: Any):
    break_fuse(without_weights, layer=1)
    model = Model()
    assert_same(model, verified(model), inputs())
    right, wrong = graph().verify
    assert right.startswith("block 0 (batched_mm, layers.0.moe, small_models.py:")
    assert wrong.startswith("block 1 (batched_mm, layers.1.moe, small_models.py:")
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "moecompile"]
    assert "block 1" in warning and "layers.1.moe" in warning and "The model's own code runs" in warning
    assert graph().sites == () and graph().before == graph().after
    assert graph().forward is not None and "moecompile" not in graph().forward
    assert "not what the model computes" in graph().near_misses[0].reason


def test_a_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch):
    emit = fuse.emit

    def wrong(target: fx.Graph, site: Site) -> fx.Node:
        node = emit(target, site)
        twisted = target.call_function(wrong_gradient, (node,))
        twisted.meta = dict(node.meta)
        return twisted

    monkeypatch.setattr(fuse, "emit", wrong)
    model = Model(layers=1)
    assert_same(model, verified(model), inputs())
    assert graph().sites == () and "gradients by 1.0e-02" in graph().verify[0]


def test_a_rewrite_that_fails_is_undone(break_fuse: Break):
    break_fuse(lambda site: dataclasses.replace(site, activation="mul(silu(gate), nobody)"))
    model = Model(layers=1)
    with pytest.raises(Exception, match="nobody"):
        # the operator's fake kernel refuses at compile time already: nothing is hidden
        verified(model)(inputs())


class Writing(nn.Module):
    """Writes into a buffer and into its input, and uses random numbers, around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.register_buffer("seen", torch.zeros(HIDDEN))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        self.seen.add_(x.sum(0))
        y = torch.nn.functional.dropout(self.layer(x), 0.5) + self.seen
        x.mul_(2)
        return y


def test_inputs_buffers_and_random_numbers_are_left_alone():
    results = []
    for run in (lambda model: model, compiled, verified):
        torch._dynamo.reset()
        moecompile.reset()
        torch.manual_seed(7)
        model, x = Writing(), torch.ones(12, HIDDEN)
        with torch.no_grad():
            results.append((run(model)(x), x, model.seen.clone(), torch.rand(())))
    assert len(graph().verify) == 1
    for other in results[:2]:
        torch.testing.assert_close(results[2], other)


# Several ranks.


def rank_main(rank: int, file: str, verdicts: list[bool]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(verdicts))
    for _ in range(2):  # the same graph may be compiled again
        assert ranks.any_rank(verdicts[rank], "graph") == any(verdicts)
    assert not ranks.any_rank(False, "graph")
    every, neighbours = range(len(verdicts)), [other for other in range(len(verdicts)) if abs(other - rank) <= 1]
    for time in "first", "again":
        words = ranks.words_of_connected(f"{time} {rank}", "groups of two", neighbours)
        assert words == {other: f"{time} {other}" for other in every}, words
    ranks.PATIENCE = timedelta(seconds=1)
    if rank == 0:
        assert ranks.words_of_connected("", "what nobody else does", neighbours) is None
    assert ranks.any_rank(True, f"a graph of rank {rank} only")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("verdicts", [[False, True, False], [False, False]])
def test_all_ranks_decide_alike(verdicts: list[bool], tmp_path: Path):
    start_ranks(len(verdicts), rank_main, (str(tmp_path / "store"), verdicts))


def test_one_rank_decides_alone():
    assert ranks.any_rank(True, "graph") and not ranks.any_rank(False, "graph")


class Dense(nn.Module):
    """All experts on all tokens; the first is so large that its rows overflow, and nobody chooses it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4, bias=False)
        self.w_in = nn.Parameter(torch.randn(4, HIDDEN, 24))
        self.w_out = nn.Parameter(torch.randn(4, 24, HIDDEN))
        with torch.no_grad():
            self.w_in[0] *= 1e38

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = (self.router(x) * x.new_tensor([0, 1, 1, 1]) + x.new_tensor([-9e9, 0, 0, 0])).topk(2)
        gates = torch.zeros(x.shape[0], 4).scatter(1, ids, weights.sigmoid())
        hidden = torch.relu(torch.einsum("th,ehi->eti", x, self.w_in))
        return torch.einsum("te,eth->th", gates, torch.einsum("eti,eih->eth", hidden, self.w_out))


def test_an_expert_that_nobody_chose_may_overflow():
    """0 * inf is NaN in the model; the rewritten block does not compute that expert, and is as good."""
    model, x = Dense(), torch.randn(12, HIDDEN) * 10
    with torch.no_grad():
        assert not model(x).isfinite().all()
        assert verified(model)(x).isfinite().all()  # a refused rewrite would overflow as well
    assert len(graph().sites) == 1
