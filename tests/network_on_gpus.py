"""The exchange between nodes over NVSHMEM, among processes that are told to be on several nodes, to the bit.

    PYTHONPATH=tests python tests/network_on_gpus.py --nodes 2 --locals 1

Each rank has a GPU of its own where there are as many, else they share. Within a host NVSHMEM goes through peer memory:
its host set-up, its device calls and the order of what they do are tested, and no network.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from moecompile.runtime import hopper_nodes
from moecompile.runtime.hopper_exchange import Rows
from moecompile.runtime.hopper_nodes import NodeExchange, NodePlan, Passed
from moecompile.runtime.node_memory import Rings, among_nodes
from moecompile.runtime.topology import Topology
from nodes_on_one_gpu import Found, Right, became, brought, routed

TOKENS, COLUMNS, TOP_K, TURNS = 300, 2048, 6, 20


def run(rank: int, topology: Topology, store: str) -> None:
    """One rank."""
    os.environ["LOCAL_WORLD_SIZE"] = str(topology.locals)
    os.environ.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "lo")
    torch.cuda.set_device(rank % torch.cuda.device_count())
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=topology.ranks)
    assert distributed.group.WORLD is not None
    experts, rings = 8 * topology.ranks, Rings(2, 2, 4)
    pitch = COLUMNS * 2 + TOP_K * 8
    memory = among_nodes(distributed.group.WORLD.group_name, topology, rings, TOKENS, -(-pitch // 16) * 16)
    right = Right(topology, experts, TOKENS)
    there, back = (NodeExchange(memory, slot, TOKENS, 20.0, None, memory.scratch, far="network") for slot in (0, 1))
    for turn in range(TURNS):
        brings = []
        for each in range(topology.ranks):
            ids = routed(each + turn, TOKENS, topology, experts, TOP_K, "random")
            brings.append(brought(each + 100 * turn, ids, COLUMNS, torch.bfloat16))
        plans = [NodePlan.of(each.ids, experts, memory, TOKENS) for each in brings]
        mine = Rows.of(brings[rank].x, brings[rank].ids, brings[rank].weights)
        into = mine.room(topology.ranks * TOKENS)
        came = torch.full((topology.ranks,), -7, dtype=torch.int32, device="cuda")
        found = Found(plans[rank], into, came, Passed.room(memory, TOKENS), into)
        hopper_nodes.launch(there, hopper_nodes.dispatch(there, mine, found.plan, found.passed))
        hopper_nodes.launch(
            there, hopper_nodes.receive(there, mine, found.plan.sent, into, came, experts // topology.ranks)
        )
        y = became(rank, into)
        sums = y.room(TOKENS)
        hopper_nodes.launch(back, hopper_nodes.combine(back, y, came, found.passed))
        hopper_nodes.launch(back, hopper_nodes.sum_at_home(back, found.plan, y, sums))
        torch.cuda.synchronize()
        assert not memory.failure(), memory.failure()
        right.check(rank, brings, plans, replace(found, sums=sums))
    distributed.barrier()
    print(f"rank {rank}: {TURNS} exchanges are right to the bit", flush=True)


def main() -> None:
    """Starts the ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--locals", type=int, default=1)
    arguments = parser.parse_args()
    topology = Topology(arguments.nodes, arguments.locals)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (topology, str(Path(folder, "store"))), nprocs=topology.ranks)


if __name__ == "__main__":
    main()
