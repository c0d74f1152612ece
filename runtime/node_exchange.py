"""The token exchange between several nodes over torch's collectives: a token crosses to a node once.

DeepSeek-V3's way (section 3.2.2): it goes to the rank of its own rail on each node that has one of its experts, and
from there to the ranks of that node that have them. What comes back is summed on each node over its ranks in their
order, in float32, rounded once, and summed at home over nodes in their order, in float32; the own node's sum is not
rounded before.

    dispatch    a record for each node: the row, its experts, weights, and its places on that node's ranks;
                passed on to these places, where the row lies as it would had it come directly
    combine     rows to the rank of the home's rail on this node, their sum to the home

N nodes of G ranks, R in all. Places are those of `moecompile.runtime.exchange`: rows, ids and weights are the same to
the bit. What a combine has to know of the dispatch stands behind `came` and in the exchange's token:

    came (R + N + N * C * G,) int32     what `came` says; how many records came from each node; and of each of them the
                                        places on this node's ranks, -1 for none
    token (N + N * C * G,) float32      the last two, as numbers that autograd passes on
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from moecompile.runtime.collectives import added, all_to_all, arrived, kept, taken, wide
from moecompile.runtime.sharded import process_group
from moecompile.runtime.topology import Topology

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def known(topology: Topology, capacity: int) -> int:
    """Numbers that a combine has to know of a dispatch, behind `came`."""
    return topology.nodes * (1 + capacity * topology.locals)


def dispatch_start(
    x: Tensor, ids: Tensor | None, weights: Tensor | None, home: Tensor, topology: Topology, group: str, capacity: int
) -> Four:
    """Sends records to the nodes, and begins to pass on what came; see `moecompile.runtime.exchange.dispatch_start`."""
    rank, places = distributed.get_rank(process_group(group)), home.view(-1, topology.nodes, topology.locals)
    token, rail = _records(places, capacity), topology.rail(rank)
    travel = topology.ranks, group
    records = [
        None if each is None else arrived(all_to_all(taken(each, token, fill), *travel, rail))
        for each, fill in ((x, 0), (ids, -1), (weights, 0))
    ]
    to_places = torch.cat(
        [taken(places[:, n], part, -1) for n, part in enumerate(token.view(topology.nodes, capacity))]
    )
    came_to = arrived(all_to_all(to_places, *travel, rail)).view(topology.nodes, capacity, topology.locals)
    order, neighbours = _passed_on(came_to, capacity), topology.neighbours(rank)
    in_flight = [
        x.new_empty(0) if each is None else all_to_all(taken(each, order, fill), *travel, neighbours)
        for each, fill in zip(records, (0, -1, 0), strict=True)
    ]
    counts = (came_to >= 0).any(2).sum(1)
    return in_flight[0], in_flight[1], in_flight[2], torch.cat([counts, came_to.reshape(-1)]).float()


def dispatch_wait(rows: Tensor, topology: Topology) -> Tensor:
    """What came, (R * C, .): by the rank that it comes from, not by the neighbour that has passed it on."""
    parts = arrived(rows).view(topology.locals, topology.nodes, -1, rows.shape[1])
    return parts.transpose(0, 1).reshape(rows.shape)


def combine_start(rows: Tensor, topology: Topology, group: str) -> Tensor:
    """Begins to send rows (R * C, .) to the ranks of this node that sum them, or whose they are."""
    neighbours = topology.neighbours(distributed.get_rank(process_group(group)))
    parts = rows.view(topology.nodes, topology.locals, -1, rows.shape[1]).transpose(0, 1)
    return all_to_all(kept(parts).view(rows.shape), topology.ranks, group, neighbours)


def combine_wait(rows: Tensor, token: Tensor, home: Tensor, topology: Topology, group: str) -> Tensor:
    """Sums what came from the ranks of this node, sends it home, and sums there what comes from all nodes: (T, .)."""
    rank = distributed.get_rank(process_group(group))
    places = token[topology.nodes :].long().view(topology.nodes, -1, topology.locals)
    parts = arrived(rows).view(topology.locals, *places.shape[:2], rows.shape[1])
    sums = parts.new_zeros(parts.shape[1:], dtype=wide(rows.dtype))
    for node in range(topology.nodes):
        for rail in range(topology.locals):
            added(sums[node], parts[rail, node], places[node, :, rail])
    rounded = sums.to(rows.dtype).view(-1, rows.shape[1])
    back = arrived(all_to_all(rounded, topology.ranks, group, topology.rail(rank))).view(sums.shape)
    own = rank // topology.locals
    total = sums.new_zeros((home.shape[0], rows.shape[1]))
    numbers = _numbers(home.view(-1, topology.nodes, topology.locals))
    for node in range(topology.nodes):
        added(total, sums[node] if node == own else back[node], numbers[:, node])
    return total.to(rows.dtype)


def _numbers(places: Tensor) -> Tensor:
    """Of (T, N, G) places the number of each token among the records to each node, (T, N); -1 where it has none."""
    meets = (places >= 0).any(2)
    return torch.where(meets, meets.cumsum(0) - 1, -1)


def _records(places: Tensor, capacity: int) -> Tensor:
    """The token of each record to each node, (N * C,); -1 where there is none."""
    numbers = _numbers(places)
    tokens, nodes = numbers.shape
    token = torch.arange(tokens, device=places.device).expand(nodes, tokens)
    return _inverse(numbers.t(), token, capacity).reshape(-1)


def _passed_on(places: Tensor, capacity: int) -> Tensor:
    """Of (N, C, G) places of records the record for each place of each rank, (G * N * C,); -1 where there is none."""
    nodes, count, ranks = places.shape
    record = torch.arange(nodes * count, device=places.device).view(nodes, count)
    return torch.stack([_inverse(places[:, :, rail], record, capacity) for rail in range(ranks)]).reshape(-1)


def _inverse(place: Tensor, what: Tensor, capacity: int) -> Tensor:
    """What has each place, (., capacity); -1 where nothing has."""
    found = what.new_full((what.shape[0], capacity + 1), -1)  # what has none falls into the last column
    return found.scatter_(1, torch.where(place < 0, capacity, place).long(), what)[:, :capacity]
