"""Graphs whose communication is hidden: same results, predicted times, and what stays in its order."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, fx, nn
from torch.distributed import _functional_collectives as functional

from moecompile.lowering import eager
from moecompile.passes import costs
from moecompile.passes.effects import kept_in_order, kinds_of
from moecompile.passes.hardware import Hardware, Link
from moecompile.passes.list_schedule import ScheduleError
from moecompile.passes.overlap import Plan, communication, move, plan, send_aside
from test_exchanges_as_on_gpus import by_kernels, traced

c10d, aten, ops = torch.ops._c10d_functional, torch.ops.aten, torch.ops.moecompile
assert by_kernels
TOKENS, FEATURES = 64, 64
SLOW = Hardware("slow", "Slow", 100, {"float32": 1e9}, 1e12, {"nvlink": Link(3e7, 0.0)}, 0.0)
"""A product of TOKENS rows takes 0.52 ms, and sending them to seven of eight ranks 0.48."""


@dataclass(frozen=True)
class Group:
    """As many ranks as a cost is to be of."""

    ranks: int = 8

    def size(self) -> int:
        return self.ranks


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One rank that exchanges with itself, where costs are of eight."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(costs, "process_group", lambda name: Group())
    yield distributed.group.WORLD.group_name  # type: ignore[union-attr]
    distributed.destroy_process_group()


class Layer(nn.Module):
    """A layer whose rows travel to experts and back, of so many micro-batches that follow each other."""

    def __init__(self, microbatches: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.microbatches, self.group = microbatches, distributed.group.WORLD.group_name  # type: ignore[union-attr]
        self.attention, self.experts, self.last = (nn.Parameter(torch.randn(FEATURES, FEATURES) / 8) for _ in range(3))

    def exchanged(self, x: Tensor) -> Tensor:
        rows = [x.shape[0]]
        return functional.all_to_all_single_autograd(x, rows, rows, self.group)

    def one(self, x: Tensor) -> Tensor:
        hidden = self.exchanged(torch.sin(x @ self.attention))
        return self.exchanged(torch.sin(hidden @ self.experts)) @ self.last + x

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(each) for each in x.chunk(self.microbatches)])


def compiled(change: Callable[[str, fx.GraphModule], None], model: nn.Module) -> Any:
    """With that done to forward and backward graph."""

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        return eager(gm, inputs, seen=change)

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)


def stepped(run: Any, model: nn.Module) -> list[Tensor]:
    """The result and all gradients."""
    x = torch.randn(2 * TOKENS, FEATURES, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model.zero_grad()
    result = run(x)
    result.backward(torch.cos(result.detach()))
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [result, *(each for each in gradients if each is not None)]


def overlap(graph: fx.Graph) -> Plan:
    """Moves nodes, if that is better; it may hold twice as much."""
    found = plan(graph, SLOW, {}, memory=2)
    if found.moves:
        move(graph, found.order)
    return found


def places(graph: fx.Graph, target: Any) -> list[int]:
    """Of calls of that, among all nodes."""
    return [number for number, node in enumerate(graph.nodes) if node.target is target]


def test_micro_batches_hide_each_others_exchange() -> None:
    model, found = Layer(2), dict[str, Plan]()

    def change(kind: str, gm: fx.GraphModule) -> None:
        found[kind] = overlap(gm.graph)
        gm.recompile()
        starts, waits = (places(gm.graph, each.default) for each in (c10d.all_to_all_single, c10d.wait_tensor))
        assert len(starts) == len(waits) == 4
        between = list(gm.graph.nodes)[starts[0] : waits[0]]
        assert any(node.target is aten.mm.default for node in between), "nothing is computed while rows travel"

    right = stepped(model, model)
    for one, other in zip(stepped(compiled(change, model), model), right, strict=True):
        assert torch.equal(one, other)
    assert found.keys() == {"forward", "backward"}
    for each in found.values():
        assert each.moves and each.after.exposed < 0.5 * each.before.exposed
        assert each.after.makespan <= 0.97 * each.before.makespan and each.after.busy == pytest.approx(each.before.busy)


def test_gradients_of_matrices_come_while_others_travel() -> None:
    """In the backward of one micro-batch there is nothing else."""
    model, found = Layer(1), dict[str, Plan]()

    def change(kind: str, gm: fx.GraphModule) -> None:
        found[kind] = overlap(gm.graph)
        gm.recompile()

    right = stepped(model, model)
    assert all(torch.equal(*both) for both in zip(stepped(compiled(change, model), model), right, strict=True))
    assert not found["forward"].moves, "there is nothing to hide it behind"
    assert found["backward"].moves and found["backward"].after.exposed < found["backward"].before.exposed


def test_what_is_predicted_of_one_exchange() -> None:
    def change(kind: str, gm: fx.GraphModule) -> None:
        times.append(plan(gm.graph, SLOW, {}).before)

    times = list[Any]()
    with torch.no_grad():
        compiled(change, Layer(1))(torch.randn(TOKENS, FEATURES))
    (found,) = times
    product, travel = 2 * TOKENS * FEATURES**2 / 1e9, TOKENS * FEATURES * 4 * 7 / 8 / 3e7
    assert found.exposed == pytest.approx(2 * travel)
    assert found.makespan == pytest.approx(3 * product + 2 * travel, rel=1e-3), "and a few bytes"


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """As AOTAutograd has it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    found: fx.GraphModule = make_fx(function, tracing_mode="fake")(*inputs)
    return found


def travels(x: Tensor, group: str) -> Tensor:
    found: Tensor = c10d.all_to_all_single(x, [x.shape[0]], [x.shape[0]], group)
    return found


def test_what_is_written_stays_between_its_readers(alone: str) -> None:
    """A buffer that is read, written and read again, beside what could be computed at any time."""

    def function(x: Tensor, buffer: Tensor) -> tuple[Tensor, ...]:
        sent = travels(x, alone)
        came = c10d.wait_tensor(sent)
        early = buffer @ x
        buffer.add_(came)
        late = buffer @ x
        return early, late, x @ x @ x

    x, buffer = torch.randn(64, 64), torch.randn(64, 64)
    traced = graph_of(function, x, buffer)
    found = overlap(traced.graph)
    traced.recompile()
    assert found.moves and found.after.exposed == 0
    right, mine = buffer.clone(), buffer.clone()
    assert all(torch.equal(*both) for both in zip(traced(x, mine), function(x, right), strict=True))
    assert torch.equal(mine, right)


def test_random_numbers_stay_in_their_order(alone: str) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        first = torch.rand_like(x) @ x
        came = c10d.wait_tensor(travels(x, alone))
        second = torch.rand_like(x) @ x @ x
        return first, came, second @ x

    x = torch.randn(64, 64)
    traced = graph_of(function, x)
    assert overlap(traced.graph).moves
    traced.recompile()
    draws = [node for node in traced.graph.nodes if "rand" in str(node.target)]
    assert [node.name for node in draws] == sorted(node.name for node in draws)
    torch.manual_seed(3)
    found = traced(x)
    torch.manual_seed(3)
    assert all(torch.equal(*both) for both in zip(found, function(x), strict=True))


def test_nothing_moves_for_less_than_it_may_be_wrong(alone: str) -> None:
    """Two per cent of what is computed."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        came = c10d.wait_tensor(travels(x[:1], alone))
        for _ in range(8):
            x = x @ x
        return came, x

    traced = graph_of(function, torch.randn(64, 64))
    names = [node.name for node in traced.graph.nodes]
    found = overlap(traced.graph)
    assert not found.moves and names == [node.name for node in traced.graph.nodes]
    assert 0 < found.before.exposed < 0.03 * found.before.makespan


def test_an_order_is_of_all_nodes(alone: str) -> None:
    traced = graph_of(lambda x: (x @ x, c10d.wait_tensor(travels(x, alone))), torch.randn(64, 64))
    with pytest.raises(ScheduleError, match="expected an order of all 3 nodes of the graph, got 1 names"):
        move(traced.graph, ["mm"])
    with pytest.raises(RuntimeError, match="before"):
        move(traced.graph, ["mm", "wait_tensor", "all_to_all_single"])


def test_exchanges_are_sent_aside_where_something_is_multiplied_meanwhile() -> None:
    """What the kernels launch would else have to wait until all is sent."""
    graph = traced(fp8=False)
    starts = [node for node in graph.nodes if node.target in (ops.dispatch_start.default, ops.combine_start.default)]
    assert len(starts) == 4 and send_aside(graph) == 0
    x: Any = starts[0].args[0]
    with graph.inserting_after(starts[0]):
        turned = graph.call_function(aten.t.default, (x,))
    with graph.inserting_after(turned):
        product = graph.call_function(aten.mm.default, (turned, x))
    turned.meta["val"] = x.meta["val"].t()
    product.meta["val"] = x.meta["val"].t() @ x.meta["val"]
    assert send_aside(graph) == 1
    assert [node.kwargs.get("aside", False) for node in starts] == [True, False, False, False]


def test_exchanges_that_share_a_slot_stay_in_order() -> None:
    """A block as one operator has two: nothing of it comes between the halves of another's."""
    graph = fx.Graph()
    x, ids, sent, home = (graph.placeholder(name) for name in ("x", "ids", "sent", "home"))
    travel: dict[str, Any] = {"ranks": 2, "group": "g", "capacity": 8, "sms": 4, "patience": 1.0}
    given = (x, ids, None, sent, home)
    start = graph.call_function(ops.dispatch_start.default, given, {**travel, "slot": 1})
    parts = [graph.call_function(operator.getitem, (start, number)) for number in range(4)]
    wait = graph.call_function(ops.dispatch_wait.default, (*parts, *given), {**travel, "slot": 1, "num_experts": 4})
    whole, apart = (
        graph.call_function(
            ops.exchanged_experts.default,
            (*given, x, x),
            {**travel, "slot": slot, "num_experts": 4, "quantized": [], "activation": "up", "gate_up": "halves"},
        )
        for slot in (0, 2)
    )
    graph.output((wait, whole, apart))
    kept = kept_in_order(graph)
    assert kept[whole] == {wait} and kept[wait] == {start} and not kept[apart]


def test_collectives_that_nobody_knows_the_time_of_stay_in_their_order() -> None:
    """They communicate all the same: all ranks have them in one order, beside those that are known."""
    graph, c10d = fx.Graph(), torch.ops._c10d_functional
    x = graph.placeholder("x")
    sent = [graph.call_function(c10d.broadcast.default, (x, 0, "a")) for _ in range(2)]
    sent.append(graph.call_function(c10d.all_reduce.default, (x, "sum", "b")))
    awaited = graph.call_function(c10d.wait_tensor.default, (sent[0],))
    sent.append(graph.call_function(c10d.all_reduce.default, (awaited, "sum", "b")))
    graph.output(tuple(sent))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(4)
    assert [kinds_of(node) != [] for node in sent] == [True, True, False, False]
    assert kept_in_order(graph)[sent[1]] == {sent[0]}
    assert [(group, after) for _, group, after in communication(graph)] == [
        ("a", ()),
        ("a", (0,)),
        ("b", ()),
        ("b", (0,)),
    ]
