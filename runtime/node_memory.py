"""Memory that ranks of several nodes write into each other's, as codegen/kernels/nodes.cuh reads it.

Every rank has the same: words that are zeros at first, and SLOTS slots for rows. A rank is `node * locals + rail`; what
goes to another node goes to the rank of its own rail there, once, and from there to the ranks that are to have it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed

from moecompile.runtime import network
from moecompile.runtime.peer_memory import addresses_of, failure_of, word_of_host
from moecompile.runtime.sharded import process_group
from moecompile.runtime.topology import Topology

RANKS, NODES, LOCALS, SLOTS, CHANNELS, RING, CHUNK = 64, 16, 8, 4, 32, 8, 32
"""At most; of nodes.cuh, and records of a chunk of node_dispatch.cuh."""
ROLES = 3
WORDS = (
    128  # who gave up
    + 2 * SLOTS * 2 * 4  # begun, ended
    + SLOTS * (ROLES + 2) * NODES * CHANNELS * 4  # claimed, chunks
    + 3 * SLOTS * RANKS * 8  # taken, over, coming
    + SLOTS * NODES * (1 + LOCALS) * 8  # announced
    + 2 * SLOTS * NODES * CHANNELS * RING * 8  # filled, freed
)
"""Bytes of what ranks tell each other."""
WARPS, STAGED = 4, 512 * 1024
"""Of a block (node_roles.cuh); bytes of each that a network sends from (network.cuh)."""
SMS_OF_A_CHANNEL, SMS = 2, 20
"""Multiprocessors; those that exchange, if nobody says otherwise (DeepSeek-V3, section 3.2.2)."""
STEPS = (
    "until that rank has passed on what its ring holds",
    "until that rank has read the rows of the exchange before",
    "until that rank's tokens have come to be passed on",
    "until that rank's tokens have come",
    "until that rank's results have come to be summed",
    "until that rank's results have come",
    "until that rank has ended",
)
"""What a rank may wait for, as nodes.cuh numbers it. Behind these: it has no room; it has left an exchange."""


@dataclass(frozen=True)
class Rings:
    """How records travel between nodes.

    Attributes:
        channels: of two multiprocessors each, which share the records among them.
        ring: chunks that a rank has room for, of each channel of each node.
        chunk: records of each at most.
    """

    channels: int = SMS // SMS_OF_A_CHANNEL
    ring: int = 4
    chunk: int = 8

    def __post_init__(self) -> None:
        """Raises ValueError where the kernels have no room for that."""
        for name, most in (("channels", CHANNELS), ("ring", RING), ("chunk", CHUNK)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"moecompile: {name} of an exchange: expected 1 to {most}, got {getattr(self, name)}")


def check(topology: Topology) -> None:
    """Raises ValueError where the kernels have no room for so many ranks."""
    if not 1 <= topology.nodes <= NODES or not 1 <= topology.locals <= LOCALS or topology.ranks > RANKS:
        raise ValueError(
            f"moecompile: an exchange among {topology.nodes} nodes of {topology.locals} ranks: expected at most "
            f"{NODES} nodes, {LOCALS} ranks of each, and {RANKS} in all"
        )


def ring_pitch(topology: Topology, pitch: int) -> int:
    """Bytes of a record on its way between nodes: behind it are its places on that node's ranks."""
    return pitch + -(-4 * topology.locals // 16) * 16


def network_scratch(rings: Rings) -> int:
    """Bytes that a network sends from, of a rank: two transports of each warp."""
    return 2 * WARPS * SMS_OF_A_CHANNEL * rings.channels * STAGED


def room_for(topology: Topology, rings: Rings, capacity: int, pitch: int) -> int:
    """Bytes of a slot for rows of `pitch` bytes, `capacity` of each rank.

    Raises:
        ValueError: the kernels have no room for so much.
    """
    check(topology)
    landing, summed = topology.ranks * capacity * pitch, topology.nodes * capacity * pitch
    ring = topology.nodes * rings.channels * rings.ring * rings.chunk * ring_pitch(topology, pitch)
    room = -(-(landing + max(summed, ring)) // 128) * 128
    if pitch % 16 or capacity < 1 or room // 16 >= 1 << 31:
        raise ValueError(
            f"moecompile: an exchange among {topology.ranks} ranks of {capacity} rows each, of {pitch} bytes: expected "
            "a multiple of 16 bytes, and less than 32 GiB"
        )
    return room


@dataclass(frozen=True, eq=False)
class NodeMemory:
    """What one rank knows of the memory.

    Attributes:
        own: this rank's, bytes.
        bases: (ranks,) int64 on the device: the address of each rank's, for this device.
        rank: among them.
        topology: of the ranks.
        rings: that it has room for.
        capacity: rows of each rank, at most.
        room: bytes of a slot.
        told: a word of the host's memory that the kernels write a failure to.
        held: what keeps the mapping of the others' memory alive.
        scratch: what a network sends from.
    """

    own: Tensor
    bases: Tensor
    rank: int
    topology: Topology
    rings: Rings
    capacity: int
    room: int
    told: Tensor
    held: object = field(default=None, repr=False)
    scratch: Tensor | None = None

    def failure(self) -> str:
        """Who gave up an exchange, waiting for whom, as far as it is known here; empty if nobody has."""
        return failure_of(int(self.told[0]), STEPS, self.topology.ranks)


def bytes_of(topology: Topology, capacity: int, room: int) -> int:
    """Of a rank's memory."""
    flags = 8 * SLOTS * (topology.ranks + topology.nodes) * capacity
    return -(-(WORDS + flags) // 128) * 128 + SLOTS * room


def among_nodes(group: str, topology: Topology, rings: Rings, capacity: int, pitch: int) -> NodeMemory:
    """Memory of a group on several nodes, in NVSHMEM's heap. All of its ranks call it.

    Args:
        group: its name.
        topology: of its ranks.
        rings: between nodes.
        capacity: rows of each rank at most.
        pitch: bytes of the longest row.

    Raises:
        NetworkMissing: as `network.join`.
        RuntimeError: ranks of a node that cannot reach each other's memory; NVSHMEM has other ranks.
    """
    network.join(group)
    rank, room = distributed.get_rank(process_group(group)), room_for(topology, rings, capacity, pitch)
    own = network.heap(bytes_of(topology, capacity, room))
    handed_over = network.heap(network_scratch(rings))
    bases = addresses_of(network.addresses(own, topology, rank), own.device)
    torch.cuda.synchronize(own.device)
    distributed.barrier(process_group(group))  # nobody writes before all have cleared theirs
    return NodeMemory(own, bases, rank, topology, rings, capacity, room, word_of_host(), scratch=handed_over)


def on_one_device(topology: Topology, rings: Rings, capacity: int, pitch: int, device: int) -> list[NodeMemory]:
    """Memory of ranks that are all on one device, and run in one launch: virtual nodes.

    Args:
        topology: of these.
        rings: between them.
        capacity: rows of each rank at most.
        pitch: bytes of the longest row.
        device: its index.
    """
    place, room = torch.device("cuda", device), room_for(topology, rings, capacity, pitch)
    every = [
        torch.zeros(bytes_of(topology, capacity, room), dtype=torch.uint8, device=place) for _ in range(topology.ranks)
    ]
    bases = addresses_of([each.data_ptr() for each in every], place)
    return [
        NodeMemory(own, bases, rank, topology, rings, capacity, room, word_of_host(), every)
        for rank, own in enumerate(every)
    ]
