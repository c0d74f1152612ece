"""Where the ranks of a group are: how many nodes, and how many ranks on each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import distributed

from moecompile.runtime.sharded import process_group


@dataclass(frozen=True)
class Topology:
    """Ranks, as many on each node: a rank is `node * locals + rail`.

    Attributes:
        nodes: N.
        locals: ranks of each.
    """

    nodes: int
    locals: int

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.locals

    @property
    def is_hierarchical(self) -> bool:
        """Whether there is something to pass on: several nodes, of several ranks each."""
        return self.nodes > 1 and self.locals > 1

    def rail(self, rank: int) -> list[int]:
        """The ranks that have the same place on their nodes as this one, in the order of nodes."""
        return [node * self.locals + rank % self.locals for node in range(self.nodes)]

    def neighbours(self, rank: int) -> list[int]:
        """The ranks of its node, itself among them."""
        first = rank // self.locals * self.locals
        return list(range(first, first + self.locals))


def topology_of(group: str, ranks: int) -> Topology:
    """Of the group of that name and size: one node if its ranks do not lie on nodes in order, as many on each.

    Where nobody says how many ranks a node has, the group is not looked at: it need not be there, of example values.
    """
    if not _ranks_of_a_node():
        return Topology(1, ranks)
    return topology_among(nodes_of(distributed.get_process_group_ranks(process_group(group))))


def is_on_one_node(group: str) -> bool:
    """Whether all ranks of the group are; likewise."""
    if not _ranks_of_a_node():
        return True
    return len(set(nodes_of(distributed.get_process_group_ranks(process_group(group))))) == 1


def topology_among(nodes: Sequence[int]) -> Topology:
    """Of ranks on these nodes, in the order of ranks."""
    of_each = nodes.count(nodes[0])
    firsts = nodes[::of_each]
    in_order = [node for node in firsts for _ in range(of_each)] == list(nodes)
    return Topology(len(firsts), of_each) if in_order and len(set(firsts)) == len(firsts) else Topology(1, len(nodes))


def nodes_of(ranks: Sequence[int]) -> list[int]:
    """The node of each of these ranks of the job.

    torchrun says how many ranks a node has (LOCAL_WORLD_SIZE); where nobody does, all are taken to be on one.
    """
    of_each = _ranks_of_a_node()
    return [rank // of_each if of_each else 0 for rank in ranks]


def _ranks_of_a_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
