"""The token exchange over torch's collectives, where no kernel does it: slow, and right.

Each rank sends C rows to each, or, on several nodes, to each node (`moecompile.runtime.node_exchange`).
Arguments and results are those of the operators of `moecompile.runtime.exchange`.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from moecompile.runtime import node_exchange
from moecompile.runtime.collectives import added, all_to_all, arrived, kept, taken, wide
from moecompile.runtime.sharded import process_group
from moecompile.runtime.topology import topology_of

Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def numbers_of_came(ranks: int, group: str, capacity: int) -> int:
    """Numbers of `came`: one for each rank of the group, and what ranks of several nodes have to know."""
    topology = topology_of(group, ranks)
    return topology.ranks + (node_exchange.known(topology, capacity) if topology.is_hierarchical else 0)


def token_like(x: Tensor, ranks: int, group: str, capacity: int) -> Tensor:
    """The shape of an exchange's token: nothing, or what ranks of several nodes have to know until its end."""
    topology = topology_of(group, ranks)
    if not topology.is_hierarchical:
        return x.new_empty(0)
    return x.new_empty(node_exchange.known(topology, capacity), dtype=torch.float32)


def dispatch_start(
    x: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    sent: Tensor,
    home: Tensor,
    ranks: int,
    group: str,
    capacity: int,
) -> Four:
    """Begins to send tokens, their experts, in 32 bits, and weights."""
    topology, ids = topology_of(group, ranks), None if ids is None else ids.to(torch.int32)
    if topology.is_hierarchical:
        found = node_exchange.dispatch_start(x, ids, weights, home, topology, group, capacity)
    else:
        token = sent.long()
        rows, of_ids, of_weights = (
            x.new_empty(0) if each is None else all_to_all(taken(each, token, fill), topology.ranks, group)
            for each, fill in ((x, 0), (ids, -1), (weights, 0))
        )
        found = rows, of_ids, of_weights, x.new_empty(0)
    return found[0], found[1] if ids is not None else found[1].to(torch.int32), *found[2:]


def dispatch_wait(
    rows: Tensor, ids: Tensor, weights: Tensor, token: Tensor, experts: int, ranks: int, group: str, capacity: int
) -> Four:
    """What came; ids from this rank's first on, of so many."""
    topology = topology_of(group, ranks)
    came = torch.full((topology.ranks,), capacity, dtype=torch.int32, device=rows.device)
    if topology.is_hierarchical:
        came = torch.cat([came, token.to(torch.int32)])

    def waited(each: Tensor) -> Tensor:
        if each.dim() != 2:
            return each.clone()
        return node_exchange.dispatch_wait(each, topology) if topology.is_hierarchical else arrived(each)

    rows, ids, weights = waited(rows), waited(ids), waited(weights)
    first = experts * distributed.get_rank(process_group(group))
    return rows, torch.where((ids >= first) & (ids < first + experts), ids - first, -1), weights, came


def combine_start(y: Tensor, weights: Tensor | None, came: Tensor, ranks: int, group: str) -> Three:
    """Begins to send back rows, NaN where there was no room for them, and weights."""
    topology = topology_of(group, ranks)
    given_up = (came[: topology.ranks] < 0).any()
    y = torch.where(given_up, torch.nan, y) if came.is_cuda or bool(given_up) else y

    def sent(each: Tensor | None) -> Tensor:
        if each is None:
            return y.new_empty(0)
        if topology.is_hierarchical:
            return node_exchange.combine_start(each, topology, group)
        return all_to_all(kept(each), topology.ranks, group)

    return sent(y), sent(weights), came[topology.ranks :].float() if topology.is_hierarchical else y.new_empty(0)


def combine_wait(
    back: Tensor, weights: Tensor, token: Tensor, home: Tensor, ranks: int, group: str
) -> tuple[Tensor, Tensor]:
    """Sums what came back."""
    topology = topology_of(group, ranks)

    def summed(each: Tensor) -> Tensor:
        if each.dim() != 2:
            return each.clone()
        if topology.is_hierarchical:
            return node_exchange.combine_wait(each, token, home, topology, group)
        rows = arrived(each)
        total = rows.new_zeros((home.shape[0], rows.shape[1]), dtype=wide(rows.dtype))
        for part, place in zip(rows.view(topology.ranks, -1, rows.shape[1]), home.unbind(1), strict=True):
            added(total, part, place)
        return total.to(rows.dtype)

    return summed(back), summed(weights)
