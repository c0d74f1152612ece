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

from moecompile.codegen.exchanges import ExchangeSend
from moecompile.runtime import hopper_exchange, hopper_nodes
from moecompile.runtime.hopper_exchange import Exchange, Rows
from moecompile.runtime.hopper_nodes import NodePlan
from moecompile.runtime.node_memory import Rings, ring_pitch
from moecompile.runtime.peer_memory import among_streams, room_for
from moecompile.runtime.topology import Topology
from moecompile.runtime.virtual_nodes import launch_all, launch_ranks
from nodes_on_one_gpu import Brought, Found, Ranks, became, brought, routed

TOKENS, COLUMNS, EXPERTS, TOP_K, SMS = 4096, 7168, 64, 8, 20
ROUNDS = 12


def timed(run: Callable[[], None], after: Callable[[], None]) -> float:
    """Median microseconds of `run`."""
    times = []
    for _ in range(ROUNDS):
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


def nodes(topology: Topology, rings: Rings, brings: Sequence[Brought]) -> dict[str, tuple[float, int]]:
    """Microseconds, and bytes that are put, of a dispatch and a combine."""
    ranks = Ranks(topology, rings, EXPERTS, TOKENS, brings[0])
    found = ranks.exchange(brings)
    ranks.check(brings, found)
    there, back = ranks.exchanges(0), ranks.exchanges(1)
    rows = [Rows.of(each.x, each.ids, each.weights) for each in brings]
    y = [replace(became(rank, each.rows), weights=None) for rank, each in enumerate(found)]
    sums = [r.room(TOKENS) for r in y]
    each = list(zip(there, rows, found, strict=True))
    dispatch = [hopper_nodes.dispatch(e, r, f.plan, f.passed) for e, r, f in each]
    receive = [hopper_nodes.receive(e, r, f.plan.sent, f.rows, f.came, EXPERTS // topology.ranks) for e, r, f in each]
    combine = [hopper_nodes.combine(e, r, f.came, f.passed) for e, r, f in zip(back, y, found, strict=True)]
    home = [hopper_nodes.sum_at_home(e, f.plan, r, s) for e, f, r, s in zip(back, found, y, sums, strict=True)]
    plans, pitch = [f.plan for f in found], rows[0].pitch
    far, near = records(topology, plans), handed(topology, plans)
    passed, of_own = passed_on(topology, found)
    return {
        "dispatch": (
            timed(
                lambda: launch_all(there, dispatch, ranks.blocks), lambda: launch_all(there, receive, ranks.blocks)
            ),
            far * ring_pitch(topology, pitch) + (near + passed) * pitch,
        ),
        "combine": (
            timed(lambda: launch_all(back, combine, ranks.blocks), lambda: launch_all(back, home, ranks.blocks)),
            (far + near + passed - of_own) * y[0].pitch,
        ),
    }  # fmt: skip


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
    arguments = parser.parse_args()
    topology = Topology(2, 2)
    brings = [
        brought(rank, routed(rank, TOKENS, topology, EXPERTS, TOP_K, "random"), COLUMNS, torch.bfloat16)
        for rank in range(topology.ranks)
    ]
    flat = Flat(brings)
    flat.send()
    flat.receive()
    torch.cuda.synchronize()
    assert not any(each.memory.failure() for each in flat.exchanges)
    time, size = timed(flat.send, flat.receive), flat.put()
    print(f"one level   dispatch {time:8.0f} us {size / 1e6:8.0f} MB put  {time * 1e6 / size:6.3f} us/MB  1.00")
    each = time / size
    for text in arguments.rings:
        ring, chunk = map(int, text.split(","))
        for name, (took, put) in nodes(topology, Rings(SMS // 2, ring, chunk), brings).items():
            rate = f"{took * 1e6 / put:6.3f} us/MB  {took / put / each:4.2f}"
            print(f"ring {ring} x {chunk:2}  {name:8} {took:8.0f} us {put / 1e6:8.0f} MB put  {rate}", flush=True)


if __name__ == "__main__":
    main()
