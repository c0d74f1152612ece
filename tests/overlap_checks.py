"""Graphs of several ranks whose communication is hidden (tests/test_ordering.py)."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, fx, nn
from torch.distributed import _functional_collectives as functional
from torch.nn import functional as F

import moecompile
from expert_parallel_models import Block, close, mesh_of
from moecompile import lowering, measuring, ordering, report
from moecompile.passes import hardware
from moecompile.passes.list_schedule import links_of

c10d = torch.ops._c10d_functional
TOKENS, FEATURES = 64, 64
SLOW = hardware.Hardware(
    "slow",
    "Slow",
    100,
    dict.fromkeys(("float32", "bfloat16", "float8"), 1e9),
    1e12,
    {"nvlink": hardware.Link(2e7, 0.0)},
    0.0,
)
"""On which products take as long as sending rows."""
OLD = not ordering.inductor_keeps_orders()
NO_ORDER = f"Inductor keeps no order before torch {ordering.KEEPS_FROM}"


class Layer(nn.Module):
    """Micro-batches that follow each other, whose rows travel to other ranks and back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.experts, self.last = (nn.Parameter(torch.randn(FEATURES, FEATURES) / 8) for _ in range(3))

    def exchanged(self, x: Tensor) -> Tensor:
        group: Any = distributed.group.WORLD
        rows = [x.shape[0] // distributed.get_world_size()] * distributed.get_world_size()
        return functional.all_to_all_single_autograd(x, rows, rows, group)

    def one(self, x: Tensor) -> Tensor:
        hidden = self.exchanged(torch.sin(x @ self.attention))
        return self.exchanged(torch.sin(hidden @ self.experts)) @ self.last + x

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(each) for each in x.chunk(2)])


class Shared(nn.Module):
    """Experts whose tokens are exchanged, and a shared one, which nobody waits for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()
        self.up, self.down = (nn.Linear(64, 64, dtype=torch.bfloat16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x) + self.down(F.silu(self.up(x)))
        return result


def compiled(model: Callable[..., Any], **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="moecompile", fullgraph=True, options={"overlap": True, **options})


def stepped(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The result and all gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    result = run(x)
    result.backward(torch.cos(result.detach()))
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [result, *(each for each in gradients if each is not None)]


def rows_of(rank: int) -> Tensor:
    return torch.randn(2 * TOKENS, FEATURES, generator=torch.Generator().manual_seed(rank))


def notes() -> str:
    return " ".join(moecompile.last_report().graphs[-1].notes)


KINDS = {"all_to_all_single": "begin", "wait_tensor": "wait", "mm": "compute", "addmm": "compute"}
CALLS = re.compile(r"^\s*(?:\w+ = )?(?:torch\.ops\._c10d_functional|extern_kernels)\.(\w+)", re.MULTILINE)


def in_code(code: str) -> list[str]:
    """What begins, awaits and computes, as generated code calls it."""
    return [KINDS[each] for each in CALLS.findall(code[code.index("def call(") :])]


def in_orders() -> list[list[str]]:
    """The same of orders that ranks have agreed on: forward, backward."""
    planned = moecompile.last_report().graphs[-1].planned.values()
    names = [[re.sub(r"_\d+$", "", name) for name in plan.order] for plan in planned]
    return [[KINDS[each] for each in order if each in KINDS] for order in names]


def permutations(every: bool = False) -> list[tuple[int, ...]]:
    """Of what communicates in the graphs that the newest one became; or all of them."""
    graphs = moecompile.last_report().graphs
    return [plan.permutation for graph in graphs[0 if every else -1 :] for plan in graph.planned.values()]


def given(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order that it came in."""
    return tuple(range(len(order)))


def on(device: hardware.Hardware, run: Callable[[], Any]) -> Any:
    """Planned for that device, and agreed on anew."""
    known = ordering._device
    vars(ordering)["_device"] = lambda: device
    ordering.forget()
    try:
        return run()
    finally:
        vars(ordering)["_device"] = known


def check_eager(rank: int, ranks: int) -> None:
    model = Layer()
    right = stepped(model, model, rows_of(rank))
    ordering.forget()
    found = stepped(compiled(model, lowering="eager"), model, rows_of(rank))
    assert all(torch.equal(*both) for both in zip(found, right, strict=True))
    said = notes()
    assert "overlap: forward: ordered, predicted of H200 SXM" in said and "overlap: backward: ordered" in said, said
    assert in_orders()[0][:3] == ["compute", "begin", "compute"]
    with tempfile.TemporaryDirectory() as folder:
        written = moecompile.last_report().trace(f"{folder}/trace.json")
        events = json.loads(written.read_text())["traceEvents"]
    processes = [each["args"]["name"] for each in events if each["name"] == "process_name"]
    assert sum("forward" in each for each in processes) >= 2 and any("as it came" in each for each in processes)


def check_inductor_keeps_the_order(rank: int, ranks: int) -> None:
    from torch._inductor.utils import run_and_get_code

    model = Layer()
    if OLD:
        try:
            compiled(model)(rows_of(rank))
        except Exception as error:
            assert f"needs torch {ordering.KEEPS_FROM} or later with Inductor" in str(error)
            return
        raise AssertionError("Inductor orders operators anew")
    right = stepped(model, model, rows_of(rank))
    found, code = on(SLOW, lambda: run_and_get_code(lambda: stepped(compiled(model), model, rows_of(rank))))
    close(found, right, 1e-5)
    orders = in_orders()
    assert len(code) == len(orders) == 2 and [in_code(each) for each in code] == orders
    assert all(each.count("begin") == 4 for each in orders), orders
    assert all(each[each.index("begin") + 1] == "compute" for each in orders), orders


def check_hosts(rank: int, ranks: int) -> None:
    """The network lies between ranks of several hosts, as torchrun tells them."""
    model = Layer()
    for of_a_host, link in (("1", "network"), (str(ranks), "nvlink")):
        ordering.forget()
        with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": of_a_host}):
            stepped(compiled(model, lowering="eager"), model, rows_of(rank))
        plans = moecompile.last_report().graphs[-1].planned.values()
        links = {name.partition(" ")[0] for plan in plans for name in links_of(plan.tasks)}
        assert links == {link}, links


def check_a_rank_that_would_gain_nothing(rank: int, ranks: int) -> None:
    """It takes the order of another, which is no worse for it."""
    model = Layer()
    right = stepped(model, model, rows_of(rank))
    device = SLOW if rank else replace(SLOW, memory=1.0)  # a second a byte: there is nothing to gain
    found = on(device, lambda: stepped(compiled(model, lowering="eager"), model, rows_of(rank)))
    assert all(torch.equal(*both) for both in zip(found, right, strict=True))
    assert all(each != given(each) for each in permutations()) and len(permutations()) == 2, permutations()
    assert notes().count("ordered, predicted of Slow") == 2, notes()
    assert (ordering.NOT_OURS in notes()) == (rank == 0), notes()


def check_a_rank_that_would_lose(rank: int, ranks: int) -> None:
    """It would hold more than it may: there all have what communicates in the order that they were given."""
    model, known = Layer(), vars(ordering)["predicted"]
    right = stepped(model, model, rows_of(rank))

    def stays(*args: Any, permutation: Any = None, guess: bool = False) -> Any:
        plan = known(*args, permutation=permutation, guess=guess)
        if rank or plan is None:
            return plan
        if permutation is None:
            return replace(plan, after=plan.before)
        return replace(plan, before=replace(plan.before, peak=0.0), most=0.0)

    vars(ordering)["predicted"] = stays
    try:
        found = on(SLOW, lambda: stepped(compiled(model, lowering="eager"), model, rows_of(rank)))
    finally:
        vars(ordering)["predicted"] = known
    assert all(torch.equal(*both) for both in zip(found, right, strict=True))
    assert all(each == given(each) for each in permutations()) and len(permutations()) == 2, permutations()
    assert (ordering.NOT_OURS in notes()) == bool(rank), notes()


def check_ranks_with_other_graphs(rank: int, ranks: int) -> None:
    """What communicates is the same, what is computed is not: each has the best order of its own."""
    model = Layer()
    other = (lambda x: model(x).cos().cos()) if rank else (lambda x: model(x).sin())
    right = stepped(other, model, rows_of(rank))
    found = on(SLOW, lambda: stepped(compiled(other, lowering="eager"), model, rows_of(rank)))
    assert all(torch.equal(*both) for both in zip(found, right, strict=True))
    assert all(each != given(each) for each in permutations()) and len(permutations()) == 2, permutations()


class Summed(nn.Module):
    """Statistics of any number of rows, summed over ranks, and others over this rank alone: groups have other names."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.world: Any = distributed.group.WORLD
        self.own, self.weight = own, nn.Parameter(torch.randn(FEATURES, FEATURES) / 8)

    def forward(self, x: Tensor) -> Tensor:
        found = x
        for number in range(2):
            mean = (x @ self.weight).sin().mean(0) * (number + 1)
            every = functional.all_reduce(mean, "sum", self.world)
            alone = functional.all_reduce(mean.cos(), "sum", self.own)
            found = found + every.sin() @ self.weight + alone
        return found


def check_groups_that_ranks_share_in_part(rank: int, ranks: int) -> None:
    """And other sizes on one rank alone, from the second call on: what communicates comes as it was agreed."""
    groups = [distributed.new_group([each]) for each in range(ranks)]
    model = Summed(groups[rank])
    report.reset()
    ordering.forget()
    with torch.no_grad():
        run = compiled(model, lowering="eager")
        for call in range(3):
            x = torch.cat([rows_of(rank)] * (1 + call * (rank == 0)))
            assert torch.equal(on(SLOW, lambda: run(x)) if not call else run(x), model(x))  # noqa: B023
    assert len(moecompile.last_report().graphs) == (1 if rank else 2)
    assert len({*permutations(every=True)}) == 1, permutations(every=True)
    words: list[Any] = [None] * ranks
    distributed.all_gather_object(words, permutations())
    assert words[0] == words[1], words


def check_a_rank_that_compiles_once_more(rank: int, ranks: int) -> None:
    """For other sizes: it takes the order that was agreed on, and meets nobody."""
    model = Layer()
    ordering.forget()
    stepped(compiled(model, lowering="eager"), model, rows_of(rank))
    agreed, seen = in_orders(), list[list[str]]()

    def alone(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        record = report.GraphReport.of(gm)
        lowering.eager(
            gm, inputs, seen=lambda _, graph: seen.append([node.name for node in graph.graph.nodes]),
            ordered=lambda kind, graph, _: ordering.order(kind, graph, record),
        )  # fmt: skip
        return lambda *args: (args[0],)  # others do not run it

    for dynamic in (False, True) if rank == 0 else ():
        torch._dynamo.reset()
        seen.clear()
        x = torch.cat([rows_of(rank)] * 2).requires_grad_()
        torch.compile(copy.deepcopy(model), backend=alone, fullgraph=True, dynamic=dynamic)(x)
        kinds = [re.sub(r"_\d+$", "", name) for name in seen[0]]
        found = [KINDS[each] for each in kinds if each in KINDS]
        assert found == agreed[0] or dynamic, found  # with symbols something else may be computed first


def check_profile(rank: int, ranks: int) -> None:
    """First calls are measured, and compute the same; then, and in later processes, graphs are ordered by that."""
    model = Layer()
    right = stepped(model, model, rows_of(rank))
    with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, {"MOECOMPILE_CACHE_DIR": directory}):
        for way in ("eager", "inductor")[: 1 if OLD else 2]:
            for known in (False, True):
                ordering.forget()
                run = compiled(model, lowering=way, profile=True)
                for call in range(measuring.CALLS + 2):
                    close(stepped(run, model, rows_of(rank)), right, 0.0 if way == "eager" else 1e-5)
                    measures = not known and call < measuring.CALLS
                    assert (", measured: " in notes()) != measures, f"call {call}: {notes()}"
                words = "measured by an earlier process" if known else f"{measuring.CALLS} calls run node by node"
                assert f"profile: forward: {words}" in notes() and f"profile: backward: {words}" in notes(), notes()
                for plan in moecompile.last_report().graphs[-1].planned.values():
                    times = [task.duration for task in plan.tasks if task.duration]
                    assert plan.unmeasured and len({*times}) > 2, times  # no two products take exactly as long
        files = [*Path(directory).rglob("*.json")]
        if rank == 0:
            for each in files:
                each.unlink()
        distributed.barrier()
        ordering.forget()  # one rank has them, the other has not: both measure
        read = measuring._read
        vars(measuring)["_read"] = lambda stored: {"mm": 1.0} if rank else read(stored)
        run = compiled(model, lowering="eager", profile=True)
        close(stepped(run, model, rows_of(rank)), right, 0.0)
        vars(measuring)["_read"] = read
        assert f"profile: forward: {measuring.CALLS} calls run node by node" in notes(), notes()


def check_shared_experts(rank: int, ranks: int) -> None:
    """Of a block whose tokens travel: what reads nothing of it comes in between."""
    model = Shared()
    whole = copy.deepcopy(model)
    moecompile.shard_experts(model, mesh_of(ranks), gradients="sum")
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(rank)).bfloat16()
    with torch.no_grad():
        right = whole(x)
        for way in ("eager", "inductor")[: 1 if OLD else 2]:
            close([on(SLOW, partial(compiled(model, lowering=way), x))], [right], 6e-3)
            assert "overlap: forward: " in notes(), notes()
            graph = str(moecompile.last_report().graphs[-1].forward)
            begun, came = graph.index("dispatch_start"), graph.index("dispatch_wait")
            assert "mm" in graph[begun:came], notes() + graph


def check_nothing_to_order(rank: int, ranks: int) -> None:
    model = nn.Linear(8, 8)
    compiled(model, lowering="eager")(torch.ones(2, 8))
    assert "overlap" not in notes()
