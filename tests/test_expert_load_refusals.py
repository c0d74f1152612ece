"""Blocks whose load is not counted, and what is said of them; which graphs count, and where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import compile_fx
from torch.nn import functional as F

import moecompile
from moecompile import loads
from moecompile.passes.expert_loads import CONTROL_FLOW, NO_PARAMETER, NO_PLAN, add_expert_loads
from small_models import HIDDEN, TOP_K, Experts, Model, compiled, inputs
from test_expert_load import TwoInOne, notes, step

ops = torch.ops.moecompile


def refused(caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """The report and the log say what is not counted."""
    assert any(note.startswith("expert_load: ") and reason in note for note in notes()), notes()
    assert reason in caplog.text


def test_parts_of_parameters_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Two blocks' loads would be added up."""
    model, x = TwoInOne(together=True), torch.randn(12, HIDDEN)
    compiled(model, expert_load=True)(x)
    assert len(moecompile.last_report().sites) == 2 and moecompile.expert_load(model) == {}
    refused(caplog, NO_PARAMETER)


def test_tensors_that_are_no_parameters_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    module = Experts()
    given = {name: each.detach() for name, each in module.named_parameters()}

    def run(x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        weights, ids = (x @ router.t()).softmax(-1).topk(TOP_K, -1)
        gate, up = torch.einsum("th,tkih->tki", x, w_in[ids]).chunk(2, -1)
        return torch.einsum("tki,tkhi,tk->th", F.silu(gate) * up, w_out[ids], weights)

    compiled(run, expert_load=True)(torch.randn(6, HIDDEN), given["router.weight"], given["w_in"], given["w_out"])
    assert len(moecompile.last_report().sites) == 1
    refused(caplog, NO_PARAMETER)


def test_what_fsdp_has_flattened_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """As its first version marks parameters."""
    model = Model()
    model.layers[0].moe.w_in._fsdp_flattened = True  # type: ignore[union-attr]
    compiled(model, expert_load=True)(inputs())
    assert moecompile.expert_load(model) == {}
    refused(caplog, loads.FLATTENED)


def test_bodies_of_control_flow_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = Experts()

        def forward(self, x: Tensor) -> Tensor:
            result: Any = torch.cond(x.sum() > 0, self.moe.forward, torch.sin, (x,))
            found: Tensor = result
            return found

    torch.manual_seed(0)
    model = Branching()
    with torch.no_grad():
        compiled(model, expert_load=True)(torch.ones(6, HIDDEN))
    assert len(moecompile.last_report().sites) == 1 and moecompile.expert_load(model) == {}
    refused(caplog, CONTROL_FLOW.format("cond"))


def test_what_is_not_rewritten_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    compiled(model, expert_load=True, disable=("fuse",))(inputs())
    assert moecompile.expert_load(model) == {}
    refused(caplog, "2 of 2 blocks are not counted: they were found, and not rewritten")


def test_near_misses_are_said(caplog: pytest.LogCaptureFixture) -> None:
    class Spied(Experts):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            weights, ids = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
            gate, up = torch.einsum("th,tkih->tki", x, self.w_in[ids]).chunk(2, -1)
            rows = F.silu(gate) * up
            return torch.einsum("tki,tkhi,tk->th", rows, self.w_out[ids], weights), rows.square().mean()

    compiled(Spied(), expert_load=True)(torch.randn(6, HIDDEN))
    assert moecompile.last_report().near_misses
    refused(caplog, "near misses are not counted: 1 of them")


def exchanged(ids_of: str) -> fx.GraphModule:
    """Rows that a dispatch brings, with a plan of its ids or of others."""
    graph = fx.Graph()
    x, ids, w_in, w_out = (graph.placeholder(name) for name in ("x", "ids", "w_in", "w_out"))
    for node, value in (
        (x, torch.empty(6, 8, device="meta")),
        (ids, torch.empty(6, 2, dtype=torch.int64, device="meta")),
        (w_in, nn.Parameter(torch.empty(2, 8, 8, device="meta"))),
        (w_out, nn.Parameter(torch.empty(2, 8, 4, device="meta"))),
    ):
        node.meta["example_value"] = value

    def part(node: fx.Node, number: int) -> fx.Node:
        return graph.call_function(__import__("operator").getitem, (node, number))

    came = graph.call_function(ops.dispatch_wait.default, (x, x, x, x, x, ids, None, x, x), {"num_experts": 4})
    of = {"brought": part(came, 1), "own": ids}[ids_of]
    plan = graph.call_function(ops.plan.default, (of, 2))
    plan.meta["example_value"] = tuple(torch.empty(2, dtype=torch.int32, device="meta") for _ in range(4))
    layout = [part(plan, number) for number in (1, 2, 3)]
    graph.output((graph.call_function(ops.experts.default, (part(came, 0), None, *layout, w_in, w_out)),))
    return fx.GraphModule(nn.Module(), graph)


def test_rows_of_other_ranks_are_not_what_is_counted() -> None:
    gm = exchanged("brought")
    done = add_expert_loads(gm)
    (count,) = gm.graph.find_nodes(op="call_function", target=ops.count_experts.default)
    assert [str(each) for each in count.args] == ["ids", "4"] and done.blocks == 1 and not done.kept
    (load,) = done.loads.values()
    assert load.meta["example_value"].shape == (4,) and load.meta["example_value"].dtype == torch.int64
    gm = exchanged("own")
    before, done = str(gm.graph), add_expert_loads(gm)
    assert [each.reason for each in done.kept] == [NO_PLAN] and not done.loads and str(gm.graph) == before


def test_cuda_graphs_are_told_that_loads_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would not take a graph that writes one of its inputs."""
    told: list[bool] = []
    inner = compile_fx.compile_fx_inner

    def noting(gm: fx.GraphModule, given: Any, **settings: Any) -> Any:
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        written = [
            node.args[0] for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        ]
        told.extend(names.index(str(each)) in settings["static_input_idxs"] for each in written)
        return inner(gm, given, **settings)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", noting)
    model = Model()
    with torch._inductor.config.patch(force_disable_caches=True):
        run = compiled(model, lowering="inductor", expert_load=True)
        step(model, run, inputs())
        with torch.no_grad():
            run(inputs())
    assert told == [True] * 4
