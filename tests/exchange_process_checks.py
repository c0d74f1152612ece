"""What ranks on one GPU check together (tests/test_exchange_processes_gpu.py): each is a function of (rank, ranks)."""

from __future__ import annotations

import copy
import functools
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble
from torch.distributed.tensor import DTensor

import moecompile
from expert_parallel_models import EXPERTS, MANY, TOP_K, Block, Model, close, compiled, tokens_of
from moecompile import measuring, ordering, splitting
from moecompile.passes import hardware
from moecompile.runtime import peer_memory
from overlap_checks import SLOW, on
from pipelines_on_one_rank import pipeline_of, step_by_itself
from ranks_on_one_gpu import meet

ops = torch.ops.moecompile
HIDDEN, INNER = 512, 256
SLOWER = replace(SLOW, links={"nvlink": hardware.Link(4e5, 0.0)})
"""On which rows take longer to send than the experts, whose tiles halves fill worse, to multiply."""


def mesh_of(ranks: int) -> DeviceMesh:
    """All ranks in one dimension."""
    meet()
    return init_device_mesh("cuda", (ranks,), mesh_dim_names=("ep",))


def results(run: Callable[..., Tensor], model: nn.Module, x: Tensor, marked: bool = False) -> list[Tensor]:
    """Output, and gradients of the tokens and of all parameters, of sharded ones this rank's part."""
    leaf = x.clone().requires_grad_()
    if marked:
        moecompile.mark_batch(leaf)
    model.zero_grad()
    out = run(leaf)
    (out.float() ** 2).sum().backward()
    assert leaf.grad is not None
    grads = [parameter.grad for parameter in model.parameters()]
    return [
        out.detach(),
        leaf.grad,
        *(each.to_local() if isinstance(each, DTensor) else each for each in grads if each is not None),
    ]


def compare(rank: int, ranks: int, counts: list[int], bound: float, model: nn.Module, **options: Any) -> None:
    """The sharded model on this rank's tokens, and the whole one on all ranks' tokens, one rank after the other."""
    torch._dynamo.reset()  # or sizes become symbols
    whole, mesh = copy.deepcopy(model), mesh_of(ranks)
    inputs = [tokens_of(each, count, hidden=HIDDEN).cuda() for each, count in enumerate(counts)]
    moecompile.shard_experts(model, mesh, src_data_rank=None)  # gloo scatters nothing of a GPU's
    found = results(compiled(model, **options), model, inputs[rank])
    (graph,) = moecompile.last_report().graphs
    whole_block = "hide" not in options.get("disable", ())
    assert ("exchanged_experts" in graph.after) == whole_block and "gather_experts" not in graph.after
    assert ("dispatch_start" in graph.after) != whole_block
    assert ("dispatched again" in str(graph.notes)) == ("ep_dispatch_again" in options)
    assert peer_memory._memories, "no kernel has exchanged anything"
    every = []
    for x in inputs:
        torch._dynamo.reset()
        every.append(results(compiled(whole, **options), whole, x))
    right = every[rank][:2]
    for number, parameter in enumerate(model.parameters(), 2):
        if isinstance(parameter, DTensor):  # the mean over ranks; of the others, this rank's own
            mean = torch.stack([each[number].float() for each in every]).mean(0)
            right.append(mean.chunk(ranks)[rank].to(parameter.dtype))
        else:
            right.append(every[rank][number])
    close(found, right, bound)


def check_forward_and_gradients(rank: int, ranks: int) -> None:
    compare(rank, ranks, [300 - 40 * each for each in range(ranks)], 1.5e-2, Model(HIDDEN, INNER, fixed=True).cuda())


def check_one_operator_after_the_other(rank: int, ranks: int) -> None:
    """As graphs are whose exchanges others reorder."""
    counts, options = [300 - 40 * each for each in range(ranks)], dict[str, Any](disable=("hide",))
    compare(rank, ranks, counts, 1.5e-2, Model(HIDDEN, INNER, fixed=True).cuda(), **options)
    compare(rank, ranks, counts, 6e-2, Model(HIDDEN, INNER, fixed=True).cuda(), precision="fp8", **options)
    options |= {"ep_dispatch_again": True}
    compare(rank, ranks, counts, 6e-2, Model(HIDDEN, INNER, fixed=True).cuda(), precision="fp8", **options)


def check_same_bits_in_training(rank: int, ranks: int) -> None:
    """Of a block and its exchange as one operator there and one back, also when these are launched from programs."""
    counts = [160 - 30 * each for each in range(ranks)]
    for options in ({}, {"precision": "fp8"}, {"precision": "fp8", "recompute": True}, {"ep_dispatch_again": True}):
        torch._dynamo.reset()
        model, mesh = Model(HIDDEN, INNER, fixed=True).cuda(), mesh_of(ranks)
        moecompile.shard_experts(model, mesh, src_data_rank=None)  # gloo scatters nothing of a GPU's
        inputs = [tokens_of(10 * turn + rank, counts[rank], hidden=HIDDEN).cuda() for turn in range(2)]
        steps = compiled(model, disable=("hide",), **options)
        right = [[each.clone() for each in results(steps, model, x)] for x in inputs]
        run = compiled(model, **options)
        for _ in range(4):  # the first calls load kernels, the next are recorded
            for x, wanted in zip(inputs, right, strict=True):
                found = results(run, model, x)
                assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


class Beside(nn.Module):
    """Experts, and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.shared = Model(HIDDEN, INNER, fixed=True), nn.Linear(HIDDEN, 8, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x) + self.shared(torch.sin(x @ x.t() @ x))
        return found


def check_order(rank: int, ranks: int) -> None:
    """Same bits in another order, whose exchanges are sent on a stream of their own."""
    in_another_order(rank, ranks, 3)


def check_profile(rank: int, ranks: int) -> None:
    """The same of an order that follows from what operators took, by CUDA events."""
    ordering.forget()  # what is known of another check is not measured
    with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, {"MOECOMPILE_CACHE_DIR": directory}):
        in_another_order(rank, ranks, measuring.CALLS // 2 + 2, profile=True)
    for kind, plan in moecompile.last_report().graphs[-1].planned.items():
        tasks = {task.name: task for task in plan.tasks}
        sent = [task.sends.duration for task in tasks.values() if task.sends is not None]
        experts = [task.duration for name, task in tasks.items() if "experts" in name]
        assert plan.unmeasured and len(sent) == 2 * len(experts) == 4, (kind, [*tasks])
        assert all(1e-6 < each < 1e-2 for each in (*sent, *experts)), (kind, sent, experts)
        if rank == 0:  # pytest -s shows it
            known = {task.name: task for task in plan.unmeasured}
            times = {name: (task.duration, known[name].duration) for name, task in tasks.items() if "experts" in name}
            print(f"{kind}: measured and predicted seconds of experts {times}, sent {sent}", flush=True)


def in_another_order(rank: int, ranks: int, turns: int, **options: Any) -> None:
    torch._dynamo.reset()
    model, mesh = Beside().cuda(), mesh_of(ranks)
    moecompile.shard_experts(model, mesh, src_data_rank=None)
    inputs = [tokens_of(10 * turn + rank, 512, hidden=HIDDEN).cuda() for turn in range(2)]
    steps = compiled(model, disable=("hide",))
    right = [[each.clone() for each in results(steps, model, x)] for x in inputs]
    run = compiled(model, disable=("hide",), overlap=True, **options)
    for _ in range(turns):
        for x, wanted in zip(inputs, right, strict=True):
            found = results(run, model, x)
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    graph = moecompile.last_report().graphs[-1]
    assert "aside=True" in str(graph.forward) and len(graph.planned) == 2, graph.notes


class Halved(nn.Module):
    """Experts, and a shared one, of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(HIDDEN, INNER, fixed=True)
        self.up, self.down = nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16), nn.Linear(HIDDEN, 8, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x) + self.down(torch.sin(self.up(x)))
        return found


def check_halves(rank: int, ranks: int) -> None:
    """Of a batch, whose exchanges are in flight together: in several steps, what the whole batch gives."""
    halves(rank, ranks, 1.5e-2)
    halves(rank, ranks, 1.5e-2, ep_dispatch_again=True)
    halves(rank, ranks, 6e-2, precision="fp8")


def halves(rank: int, ranks: int, bound: float, **options: Any) -> None:
    torch._dynamo.reset()
    splitting.forget()
    most, tokens = 512, 512 - 96 * rank
    model, mesh = Halved().cuda(), mesh_of(ranks)
    moecompile.shard_experts(model, mesh, src_data_rank=None)
    inputs = [tokens_of(10 * turn + rank, tokens - 64 * turn, hidden=HIDDEN).cuda() for turn in range(2)]
    steps = compiled(model, ep_capacity=most, **options)
    right = [[each.clone() for each in results(steps, model, x)] for x in inputs]
    torch._dynamo.reset()
    run = compiled(model, microbatches=2, ep_capacity=most, **options)

    def steps_on_halves() -> None:  # a rank may compile once more, alone, for another number of blocks of tokens
        for turn in range(6):
            close(results(run, model, inputs[turn % 2], marked=True), right[turn % 2], bound)

    on(SLOWER, steps_on_halves)
    graph = moecompile.last_report().graphs[-1]
    assert "microbatches: two halves of the batch, 2 exchanges of each" in str(graph.notes), graph.notes
    forward = str(graph.forward)
    assert "aside=True" in forward and {*re.findall(r"slot=(\d+)", forward)} == {*"0123"}, forward
    assert {*re.findall(r"capacity=(\d+)", forward)} == {str(most // 2)}, forward


class Layer(nn.Module):
    """A pipeline's stage: experts, and a shared one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.block = Block(HIDDEN, INNER)
        self.up, self.down = (nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.block(x) + self.down(torch.sin(self.up(x)))
        return found


def check_pipeline(rank: int, ranks: int) -> None:
    """Of two stages on every rank, whose experts all share: exchanges of two micro-batches are in flight at once."""
    for make in (ScheduleDualPipeV, ScheduleZBVZeroBubble):
        on(SLOWER, functools.partial(pipelined, rank, ranks, make))
    on(SLOWER, functools.partial(pipelined, rank, ranks, ScheduleDualPipeV, precision="fp8"))


def pipelined(rank: int, ranks: int, make: Any, **options: Any) -> None:
    torch._dynamo.reset()
    meet()
    mesh = init_device_mesh("cuda", (1, ranks), mesh_dim_names=("stages", "experts"))
    found, right = ([Layer(number).cuda() for number in range(2)] for _ in range(2))
    for each in (*found, *right):
        moecompile.shard_experts(each, mesh["experts"], src_data_rank=None)
        apart = {"disable": ("hide",)} if each in right else {}  # as in pipelines
        each.compile(backend="moecompile", fullgraph=True, options={"lowering": "eager", **options, **apart})
    tokens, microbatches = 512, 4  # a power of two: gradients are divided after FP8's rounding, those to compare before
    like = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    schedule, pipeline = pipeline_of(make, found, microbatches, like, group=mesh.get_group("stages"))
    for step in range(3):
        x, target = (tokens_of(10 * step + rank + of, microbatches * tokens, hidden=HIDDEN).cuda() for of in (0, 5))
        schedule.step(x, target=target)
        step_by_itself(schedule, right, x, target, microbatches)
        close(gradients(found), gradients(right), 1e-3)
        for each in (*found, *right):
            each.zero_grad()
    words = str(pipeline)
    assert pipeline.counts["first part"] == pipeline.counts["second part"] > 0 and not pipeline.apart, words
    assert (pipeline.counts["pair"] > 0) == (make is ScheduleDualPipeV), words
    if pipeline.counts["pair"]:
        notes = [note for graph in moecompile.last_report().graphs for note in graph.notes]
        assert any("pair 1: ordered" in note for note in notes), notes


def gradients(stages: list[Layer]) -> list[Tensor]:
    """Of all parameters, of sharded ones this rank's part."""
    found: list[Any] = [parameter.grad for stage in stages for parameter in stage.parameters()]
    return [each.to_local() if isinstance(each, DTensor) else each for each in found]


def check_inductor(rank: int, ranks: int) -> None:
    model = Model(HIDDEN, INNER, fixed=True).cuda()
    compare(rank, ranks, [256] * ranks, 1.5e-2, model, lowering="inductor")


def check_fp8(rank: int, ranks: int) -> None:
    compare(rank, ranks, [256] * ranks, 6e-2, Model(HIDDEN, INNER, fixed=True).cuda(), precision="fp8")


def check_dispatched_again(rank: int, ranks: int) -> None:
    """In the backward, with the same outcome."""
    counts, options = [256 - 30 * each for each in range(ranks)], {"ep_dispatch_again": True}
    compare(rank, ranks, counts, 1.5e-2, Model(HIDDEN, INNER, fixed=True).cuda(), **options)
    compare(rank, ranks, counts, 6e-2, Model(HIDDEN, INNER, fixed=True).cuda(), precision="fp8", **options)


def check_a_rank_without_tokens(rank: int, ranks: int) -> None:
    compare(rank, ranks, [200] * (ranks - 1) + [0], 1.5e-2, Model(HIDDEN, INNER, fixed=True).cuda())


def check_captured(rank: int, ranks: int) -> None:
    """A CUDA graph of the forward, replayed with other tokens, by ranks that are late now and then."""
    captured(rank, ranks, 160)


def captured(rank: int, ranks: int, tokens: int) -> None:
    """The same for so many tokens."""
    model, mesh = Model(HIDDEN, INNER, fixed=True).cuda().eval(), mesh_of(ranks)
    whole = compiled(copy.deepcopy(model))
    moecompile.shard_experts(model, mesh, src_data_rank=None)  # gloo scatters nothing of a GPU's
    run, x = compiled(model), torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(x)
        torch.cuda.synchronize()
        distributed.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(x)
        for _ in range(30):
            x.copy_(torch.randn_like(x))
            if random.random() < 0.3:
                time.sleep(random.random() / 50)
            graph.replay()
            close([y], [whole(x)], 1.5e-2)


def hidden(rank: int, ranks: int, counts: list[int], bound: float, **options: object) -> None:
    """Exchanges behind the experts: bit for bit those before and after them, time and again; and the whole model."""
    model, mesh = Model(HIDDEN, INNER, fixed=True).cuda().eval(), mesh_of(ranks)
    whole = compiled(copy.deepcopy(model), **options)
    moecompile.shard_experts(model, mesh, src_data_rank=None)  # gloo scatters nothing of a GPU's
    inputs = [tokens_of(10 * turn + rank, counts[rank], hidden=HIDDEN).cuda() for turn in range(4)]
    with torch.no_grad():
        right = [whole(x) for x in inputs]
        after = compiled(model, disable=("hide",), **options)
        shown = [after(x) for x in inputs]
        run = compiled(model, **options)
        for _ in range(5):  # the first calls load kernels, the next are recorded
            found = [run(x) for x in inputs]
            if random.random() < 0.5:
                time.sleep(random.random() / 20)
            for one, other, close_to in zip(found, shown, right, strict=True):
                assert torch.equal(one, other)
                close([one], [close_to], bound)
    graph = moecompile.last_report().graphs[-1]
    assert "exchanged_experts" in graph.after and "dispatch_start" not in graph.after


def check_hidden(rank: int, ranks: int) -> None:
    hidden(rank, ranks, [MANY - 100 * each for each in range(ranks)], 1.5e-2)


def check_hidden_in_fp8(rank: int, ranks: int) -> None:
    hidden(rank, ranks, [MANY - 100 * each for each in range(ranks)], 2e-2, precision="fp8")


def check_hidden_and_a_rank_without_tokens(rank: int, ranks: int) -> None:
    for precision in ("model", "fp8"):
        hidden(rank, ranks, [MANY] * (ranks - 1) + [0], 2e-2, precision=precision)


def check_hidden_and_captured(rank: int, ranks: int) -> None:
    """A CUDA graph of two streams, replayed with other tokens, by ranks that are late now and then."""
    captured(rank, ranks, MANY)
    assert any("exchanged_experts" in graph.after for graph in moecompile.last_report().graphs)


def exchanges(rank: int, ranks: int, turns: int) -> None:
    """Every byte of exchanges that follow each other, two in flight at a time, without a wait of the host between."""
    mesh, columns, capacity = mesh_of(ranks), 256, 64
    among = {"ranks": ranks, "group": mesh.get_group().group_name, "capacity": capacity, "sms": 8, "patience": 60.0}
    here, wrong = EXPERTS // ranks, torch.zeros((), dtype=torch.int64, device="cuda")

    def brought(turn: int, of: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(1000 * turn + of)
        count = (turn * 37 + of * 11) % (capacity + 1)
        scores = torch.rand(count, EXPERTS, generator=generator, device="cuda")
        x = torch.randn(count, columns, generator=generator, device="cuda").bfloat16()
        return x, scores.topk(TOP_K, 1).indices, scores[:, :TOP_K].contiguous()

    for turn in range(turns):
        begun = []
        for slot in (0, 2):
            x, ids, weights = brought(turn + slot, rank)
            sent, home = ops.exchange_plan(ids, num_experts=EXPERTS, ranks=ranks, capacity=capacity)
            given = x, ids, weights, sent, home
            begun.append((given, ops.dispatch_start(*given, slot=slot, **among)))
        for slot, (given, handles) in zip((0, 2), begun, strict=True):
            rows, _, row_weights, came = ops.dispatch_wait(*handles, *given, num_experts=EXPERTS, slot=slot, **among)
            for other in range(ranks):
                x, ids, weights = brought(turn + slot, other)
                meets = (ids.div(here, rounding_mode="floor") == rank).any(1)
                place = torch.where(meets, meets.cumsum(0) - 1, capacity)
                of_other = torch.full((capacity + 1,), -1, dtype=torch.int64, device="cuda")
                of_other.scatter_(0, place, torch.arange(len(x), device="cuda"))
                there = of_other[:capacity] >= 0
                token = of_other[:capacity].clamp(min=0)
                part = slice(other * capacity, (other + 1) * capacity)
                wrong += came[other] != there.sum()
                if len(x):
                    wrong += ((rows[part] != x[token]) & there[:, None]).sum()
                    wrong += ((row_weights[part] != weights[token]) & there[:, None]).sum()
            y = (rows.float() * (rank + 1)).to(rows.dtype)
            back = ops.combine_start(y, None, came, *given[3:], slot=slot + 1, **among)
            sums, _ = ops.combine_wait(*back, y, None, *given[3:], slot=slot + 1, **among)
            x, ids, _ = given[:3]
            total = torch.zeros_like(x, dtype=torch.float32)
            for other in range(ranks):
                meets = (ids.div(here, rounding_mode="floor") == other).any(1, keepdim=True)
                total += torch.where(meets, (x.float() * (other + 1)).to(x.dtype).float(), 0)
            wrong += (sums != total.to(x.dtype)).sum()
        if turn % 50 == 49 or turn == turns - 1:
            assert not int(wrong), f"{int(wrong)} wrong values by exchange {turn}"


def check_consecutive_exchanges(rank: int, ranks: int) -> None:
    exchanges(rank, ranks, 100)


def check_ten_thousand_exchanges(rank: int, ranks: int) -> None:
    exchanges(rank, ranks, 5000)


def check_a_rank_that_does_not_come(rank: int, ranks: int) -> None:
    """The others' results are NaN, no step of an optimizer and no exchange goes on, and nobody hangs."""
    model, mesh = Model(HIDDEN, INNER, fixed=True).cuda(), mesh_of(ranks)
    moecompile.shard_experts(model, mesh, src_data_rank=None)  # gloo scatters nothing of a GPU's
    run, x = compiled(model, ep_patience=2.0), tokens_of(rank, 100, hidden=HIDDEN).cuda()
    run(x)
    torch.cuda.synchronize()
    distributed.barrier()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if rank == ranks - 1:
        time.sleep(6)
        distributed.barrier()
        return
    out = run(x)
    torch.cuda.synchronize()
    assert bool(out.isnan().all())
    for call in (optimizer.step, lambda: run(x), out.float().sum().backward):
        try:
            call()
        except RuntimeError as error:
            assert f"for rank {ranks - 1} (dispatch 0" in str(error), error
        else:
            raise AssertionError(f"{call} goes on")
    distributed.barrier()
