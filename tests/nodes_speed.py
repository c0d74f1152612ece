"""How fast ranks of virtual nodes exchange tokens, beside the kernels of one node: `python tests/nodes_speed.py`.

All ranks are on one GPU, so links are its memory: what is compared is what the kernels cost for each byte that they
put, and not a network. Times are medians of launches that all ranks share.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch

from changed_kernels import changed
from moecompile.codegen.exchanges import ExchangeSend
from moecompile.runtime import hopper_exchange, hopper_nodes
from moecompile.runtime.hopper_exchange import Exchange, Rows
from moecompile.runtime.hopper_nodes import NodePlan
from moecompile.runtime.node_memory import Rings, ring_pitch
from moecompile.runtime.peer_memory import among_streams, room_for
from moecompile.runtime.topology import Topology
from moecompile.runtime.virtual_nodes import launch_all, launch_ranks
from nodes_on_one_gpu import ROLES, Brought, Found, Ranks, became, brought, routed

TOKENS, COLUMNS, EXPERTS, TOP_K, SMS = 4096, 7168, 64, 8, 20
READERS = 66
"""Blocks of each rank that read: together two of each multiprocessor, as many as fit at once."""
ROUNDS = 12


def timed(run: Callable[[], None], after: Callable[[], None], before: Callable[[], None] = lambda: None) -> float:
    """Median microseconds of `run`."""
    times = []
    for _ in range(ROUNDS):
        before()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        after()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return median(times[2:])


class Flat:
    """The kernels of one node, among as many ranks."""

    def __init__(self, brings: Sequence[Brought]) -> None:
        ranks = len(brings)
        self.rows = [Rows.of(each.x, each.ids, each.weights) for each in brings]
        memories = among_streams(ranks, room_for(ranks, TOKENS, self.rows[0].pitch), 0)
        self.exchanges = [Exchange(memory, 0, TOKENS, SMS, 20.0) for memory in memories]
        self.plans = [hopper_exchange.plan(each.ids, EXPERTS, ranks, TOKENS) for each in brings]
        self.room = [(r.room(ranks * TOKENS), torch.empty(ranks, dtype=torch.int32, device="cuda")) for r in self.rows]

    def send(self) -> None:
        arguments = []
        for exchange, rows, (sent, _) in zip(self.exchanges, self.rows, self.plans, strict=True):
            arguments.append(
                (
                    *exchange.peers(rows.pitch), rows.values, sent, None, rows.ids, rows.weights, rows.row_bytes,
                    rows.line_bytes, rows.top_k, rows.weight_bytes, -1, None,
                )
            )  # fmt: skip
        launch_ranks(ExchangeSend(self.rows[0].id_type), arguments, SMS, 0)

    def receive(self) -> None:
        for exchange, rows, (sent, _), (into, came) in zip(
            self.exchanges, self.rows, self.plans, self.room, strict=True
        ):
            hopper_exchange.receive(exchange, rows, sent, into, came, EXPERTS // len(self.rows))

    def put(self) -> int:
        """Bytes."""
        rows = sum(
            int((sent >= 0).sum()) - int((home[:, rank] >= 0).sum()) for rank, (sent, home) in enumerate(self.plans)
        )
        return rows * self.rows[0].pitch


class Exchanged:
    """Kernels of nodes, whose ranks have exchanged tokens once."""

    def __init__(self, topology: Topology, rings: Rings, brings: Sequence[Brought], through: str = "peer") -> None:
        self.ranks = ranks = Ranks(topology, rings, EXPERTS, TOKENS, brings[0], through)
        self.found = found = ranks.exchange(brings)
        ranks.check(brings, found)
        self.there, self.back = ranks.exchanges(0), ranks.exchanges(1)
        self.rows = [Rows.of(each.x, each.ids, each.weights) for each in brings]
        self.y = [replace(became(rank, each.rows), weights=None) for rank, each in enumerate(found)]
        sums = [r.room(TOKENS) for r in self.y]
        each = list(zip(self.there, self.rows, found, strict=True))
        here = EXPERTS // topology.ranks
        back = list(zip(self.back, found, self.y, sums, strict=True))
        self.calls = {
            "dispatch": [hopper_nodes.dispatch(e, r, f.plan, f.passed) for e, r, f in each],
            "receive": [hopper_nodes.receive(e, r, f.plan.sent, f.rows, f.came, here) for e, r, f in each],
            "combine": [hopper_nodes.combine(e, y, f.came, f.passed) for e, f, y, _ in back],
            "home": [hopper_nodes.sum_at_home(e, f.plan, y, s) for e, f, y, s in back],
        }

    def run(self, name: str) -> None:
        """One kernel, of all ranks."""
        exchanges = self.there if name in ("dispatch", "receive") else self.back
        launch_all(exchanges, self.calls[name], self.ranks.blocks if name in ("dispatch", "combine") else READERS)

    def times(self) -> dict[str, float]:
        """Microseconds of each kernel."""
        found = {}
        for sends, reads in (("dispatch", "receive"), ("combine", "home")):
            found[sends] = timed(lambda: self.run(sends), lambda: self.run(reads))  # noqa: B023
            found[reads] = timed(lambda: self.run(reads), lambda: None, lambda: self.run(sends))  # noqa: B023
        return found

    def roles(self, name: str) -> dict[str, tuple[float, float]]:
        """Of a kernel of metered transports: each role's share of warps' time, and what they wait of that."""
        scratch = self.ranks.scratch
        scratch.zero_()
        self.run(name)
        self.run({"dispatch": "receive", "combine": "home"}[name])
        spent, waited = scratch.view(torch.int64).view(-1, 2, len(ROLES), 2)[:, 0].sum(0).double().cpu().unbind(1)
        return {
            role: (float(each / spent.sum()), float(of / each))
            for role, each, of in zip(ROLES, spent, waited, strict=True)
            if each
        }

    def put(self) -> dict[str, int]:
        """Bytes, by kernels that put any."""
        topology, plans, pitch = self.ranks.topology, [f.plan for f in self.found], self.rows[0].pitch
        far, near = records(topology, plans), handed(topology, plans)
        passed, of_own = passed_on(topology, self.found)
        return {
            "dispatch": far * ring_pitch(topology, pitch) + (near + passed) * pitch,
            "combine": (far + near + passed - of_own) * self.y[0].pitch,
        }


def beside(exchanged: Exchanged) -> dict[str, float]:
    """Microseconds of a product of matrices, by the kernel that runs beside it."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (6144, 6144))
    other, found = torch.cuda.Stream(), {}
    for name, reads in (("", ""), ("dispatch", "receive"), ("combine", "home")):
        times = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize()
            if name:
                exchanged.run(name)
            torch.cuda._sleep(20000)
            with torch.cuda.stream(other):
                torch.cuda._sleep(100000)
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                a @ b
                end.record()
            if name:
                exchanged.run(reads)
            torch.cuda.synchronize()
            times.append(1000 * begin.elapsed_time(end))
        found[name] = median(times[2:])
    return found


def records(topology: Topology, plans: Sequence[NodePlan]) -> int:
    """That travel between nodes."""
    return sum(
        int((plan.node_home >= 0).sum()) - int((plan.node_home[:, rank // topology.locals] >= 0).sum())
        for rank, plan in enumerate(plans)
    )


def handed(topology: Topology, plans: Sequence[NodePlan]) -> int:
    """Rows for other ranks of a node."""
    return sum(
        int((plan.home[:, topology.neighbours(rank)] >= 0).sum()) - int((plan.home[:, rank] >= 0).sum())
        for rank, plan in enumerate(plans)
    )


def passed_on(topology: Topology, found: Sequence[Found]) -> tuple[int, int]:
    """Rows of other nodes that ranks have passed on, and those of them that each has passed on to itself."""
    total = own = 0
    for rank, each in enumerate(found):
        for node in range(topology.nodes):
            has = each.passed.places[node, : int(each.passed.records[node])] >= 0
            total, own = total + int(has.sum()), own + int(has[:, rank % topology.locals].sum())
    return total, own


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rings", nargs="*", default=["4,8", "4,4", "4,16", "2,8", "8,8", "8,16", "2,32"])
    parser.add_argument("--roles", action="store_true", help="what warps do, and how long they wait")
    parser.add_argument("--beside", action="store_true", help="a product of matrices beside 3 channels a rank")
    arguments = parser.parse_args()
    topology = Topology(2, 2)
    brings = [
        brought(rank, routed(rank, TOKENS, topology, EXPERTS, TOP_K, "random"), COLUMNS, torch.bfloat16)
        for rank in range(topology.ranks)
    ]
    if arguments.roles:
        exchanged = Exchanged(topology, Rings(SMS // 2, 4, 8), brings, "metered")
        for name in ("dispatch", "combine"):
            for role, (share, waits) in exchanged.roles(name).items():
                print(f"{name:8} {role:14} {share:5.1%} of warps' time, of which {waits:5.1%} waiting", flush=True)
        return
    if arguments.beside:
        for hints in (True, False, True, False):
            with changed(*([] if hints else [("ptx.cuh", "L2::evict_first", "L2::evict_normal")])):
                for name, took in beside(Exchanged(topology, Rings(3, 4, 8), brings)).items():
                    said = f"product of matrices beside {name or 'nothing':9} {took:8.0f} us"
                    print(f"{said}  {'with' if hints else 'without'} hints", flush=True)
        return
    flat = Flat(brings)
    flat.send()
    flat.receive()
    torch.cuda.synchronize()
    assert not any(each.memory.failure() for each in flat.exchanges)
    time, size = timed(flat.send, flat.receive), flat.put()
    received = timed(flat.receive, lambda: None, flat.send)
    print(f"one level   dispatch {time:8.0f} us {size / 1e6:8.0f} MB put  {time * 1e6 / size:6.3f} us/MB  1.00")
    print(f"one level   receive  {received:8.0f} us, ranks one after the other")
    for text in arguments.rings:
        ring, chunk = map(int, text.split(","))
        exchanged = Exchanged(topology, Rings(SMS // 2, ring, chunk), brings)
        put = exchanged.put()
        for name, took in exchanged.times().items():
            rate = ""
            if name in put:
                rate = f" {put[name] / 1e6:8.0f} MB put  {took * 1e6 / put[name]:6.3f} us/MB"
                rate += f"  {took / put[name] * size / time:4.2f}"
            print(f"ring {ring} x {chunk:2}  {name:8} {took:8.0f} us{rate}", flush=True)


if __name__ == "__main__":
    main()
