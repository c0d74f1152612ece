"""The token exchange between several nodes on Hopper GPUs: codegen/kernels/node_*.cuh, with their arguments.

    sent, home = plan of ranks        as on one node: which token lies at which place of which rank
    node_sent, node_home              the same of nodes, as if each were a rank: which record goes to which node
    dispatch, receive                 between nodes a token travels once, and is passed on to the ranks that have it
    combine, sum_at_home              summed on each node in float32, rounded, and summed at home in float32

Which tokens lie where is what it is without nodes (`moecompile.runtime.exchange`), to the bit; what differs is the way
that they take, and that a sum of another node's ranks is rounded before it comes home.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moecompile.codegen.exchanges import NodeCombine, NodeDispatch, NodeHome, NodeReceive
from moecompile.runtime import hopper_exchange
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.hopper_exchange import Rows
from moecompile.runtime.launch import Launch, Value, load
from moecompile.runtime.node_memory import CHUNK, SMS_OF_A_CHANNEL, NodeMemory, network_scratch, ring_pitch, room_for
from moecompile.runtime.peer_memory import PATIENCE

Call = tuple[NodeDispatch | NodeReceive | NodeCombine | NodeHome, tuple[Value, ...]]
"""A kernel, and what it is given."""


@dataclass(frozen=True)
class NodePlan:
    """Where a rank's T tokens go.

    Attributes:
        sent: (ranks * capacity,) int32: the token at each place of each rank; -1 where there is none.
        home: (T, ranks) int32: the place of a token on each rank; -1 where it has none.
        node_sent: (nodes * capacity,) int32: the token of each record to each node; -1 where there is none.
        node_home: (T, nodes) int32: its number among these; -1 where it has none.
    """

    sent: Tensor
    home: Tensor
    node_sent: Tensor
    node_home: Tensor

    @classmethod
    def of(cls, expert_ids: Tensor, num_experts: int, memory: NodeMemory, capacity: int) -> NodePlan:
        """For (T, K) ids; see `moecompile.runtime.hopper_exchange.plan`."""
        ranks = hopper_exchange.plan(expert_ids, num_experts, memory.topology.ranks, capacity)
        return cls(*ranks, *hopper_exchange.plan(expert_ids, num_experts, memory.topology.nodes, capacity))


@dataclass(frozen=True)
class Passed:
    """What a rank has passed on to the ranks of its node, of the tokens that came from its rail: a combine needs it.

    Attributes:
        places: (nodes, capacity, locals) int32: of each record the place on each rank; -1 where it has none.
        records: (nodes,) int32: how many there were; none of this node.
    """

    places: Tensor
    records: Tensor

    @classmethod
    def room(cls, memory: NodeMemory, capacity: int) -> Passed:
        """For a dispatch to write."""
        shape, device = (memory.topology.nodes, capacity, memory.topology.locals), memory.own.device
        return cls(
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.zeros(shape[0], dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class NodeExchange:
    """One exchange of a rank.

    Attributes:
        memory: of this rank.
        slot: of it.
        capacity: rows of each rank at most.
        patience: seconds that a rank waits for another.
        chunk: records that travel together between nodes; None for as many as the memory has room for.
        scratch: of transports that hold back what they are given, or send it from there.
        near: how ranks of one node exchange, one of `moecompile.codegen.instances.TRANSPORTS`.
        far: how ranks of different nodes do.
    """

    memory: NodeMemory
    slot: int
    capacity: int
    patience: float = PATIENCE
    chunk: int | None = None
    scratch: Tensor | None = None
    near: str = "peer"
    far: str = "peer"

    @property
    def blocks(self) -> int:
        """Of the kernels that send."""
        return SMS_OF_A_CHANNEL * self.memory.rings.channels

    @property
    def reads(self) -> str:
        """How ranks of different nodes are told that rows have been read: what tests do to rows is not done to that."""
        return "network" if self.far == "network" else "peer"

    def values(self, pitch: int) -> tuple[Value, ...]:
        """`Exchange` of nodes.cuh, for rows of `pitch` bytes.

        Raises:
            ValueError: the memory has no room for these.
        """
        memory, rings = self.memory, self.memory.rings
        longest = ring_pitch(memory.topology, pitch)
        if self.capacity > memory.capacity or room_for(memory.topology, rings, self.capacity, pitch) > memory.room:
            raise ValueError(
                f"moecompile: an exchange of {self.capacity} rows a rank, of {pitch} bytes, where there is room for "
                f"{memory.capacity} rows and {memory.room} bytes"
            )
        if not hopper_exchange.fits(longest):
            raise ValueError(f"moecompile: rows of {longest} bytes: expected {hopper_exchange.RING // 2} at most")
        chunk = rings.chunk if self.chunk is None else self.chunk
        if not 1 <= chunk <= min(rings.chunk, CHUNK):
            raise ValueError(f"moecompile: chunks of {chunk} records: expected 1 to {rings.chunk}")
        if self.far == "network" and (self.scratch is None or self.scratch.numel() < network_scratch(rings)):
            raise ValueError(
                f"moecompile: an exchange over a network sends from {network_scratch(rings)} bytes of NVSHMEM's heap "
                f"(`NodeMemory.scratch`), got {0 if self.scratch is None else self.scratch.numel()}"
            )
        topology = memory.topology
        who = (memory.rank, topology.ranks, topology.nodes, topology.locals, *divmod(memory.rank, topology.locals))
        how = (
            self.slot,
            memory.room // 16,
            self.capacity,
            pitch,
            rings.channels,
            rings.ring,
            chunk,
            memory.capacity,
            max(1, round(self.patience * 1000)),
            int(self.far == "network"),
        )
        return (memory.bases, memory.told, *who, *how)


def dispatch(exchange: NodeExchange, rows: Rows, plan: NodePlan, passed: Passed) -> Call:
    """Sends each token to the ranks of its experts, and passes on what comes from other nodes.

    Args:
        exchange: of this rank.
        rows: T of them.
        plan: of their experts.
        passed: written.
    """
    return NodeDispatch(rows.id_type, exchange.near, exchange.far), (
        *exchange.values(rows.pitch), rows.values, plan.sent, plan.home, plan.node_sent, rows.ids, rows.weights,
        passed.places, passed.records, exchange.scratch, rows.row_bytes, rows.line_bytes, rows.top_k, rows.weight_bytes,
    )  # fmt: skip


def receive(exchange: NodeExchange, rows: Rows, sent: Tensor, into: Rows, came: Tensor, experts: int) -> Call:
    """Waits for what came from all ranks; see `moecompile.runtime.hopper_exchange.receive`.

    Args:
        exchange: of this rank.
        rows: what this rank sends: its own are read where they are.
        sent: of the plan.
        into: room for ranks * capacity rows.
        came: (ranks,) int32; how many rows came from each.
        experts: of each rank.
    """
    return NodeReceive(rows.id_type, exchange.reads), (
        *exchange.values(rows.pitch), rows.values, sent, rows.ids, rows.weights, into.values, into.ids, into.weights,
        came, None, None, 0, None, 0, rows.line_bytes, rows.row_bytes // 16, rows.top_k, rows.weight_bytes, experts,
    )  # fmt: skip


def combine(exchange: NodeExchange, rows: Rows, came: Tensor, passed: Passed) -> Call:
    """Sends back what became of each row, summed on each node for the others.

    Args:
        exchange: of this rank.
        rows: ranks * capacity of them, contiguous.
        came: (ranks,) int32; so many of each rank's go back.
        passed: of the dispatch that they came by.
    """
    return NodeCombine(*_dtypes(rows), exchange.near, exchange.far), (
        *exchange.values(rows.pitch), rows.values, came, passed.places, passed.records, rows.weights, exchange.scratch,
        rows.values.shape[1], rows.top_k,
    )  # fmt: skip


def sum_at_home(exchange: NodeExchange, plan: NodePlan, rows: Rows, into: Rows) -> Call:
    """Sums what came back for each token, and what travelled with it.

    Args:
        exchange: of this rank.
        plan: of the tokens.
        rows: what this rank sends: its own are read where they are.
        into: room for T of them.
    """
    tokens, columns = into.values.shape
    return NodeHome(*_dtypes(rows), exchange.reads), (
        *exchange.values(rows.pitch), plan.home, plan.node_home, rows.values, rows.weights, into.values, into.weights,
        tokens, columns, rows.top_k,
    )  # fmt: skip


def launch(exchange: NodeExchange, call: Call) -> None:
    """On this rank's device, which it has for itself."""
    instance, values = call
    kernel = load(instance, exchange.memory.own.device.index)
    sends = isinstance(instance, NodeDispatch | NodeCombine)
    Launch(kernel, exchange.blocks if sends else hopper_exchange.READERS * kernel.multiprocessors, values).run()


def _dtypes(rows: Rows) -> tuple[str, str]:
    return dtype_name(rows.values.dtype), dtype_name((rows.values if rows.weights is None else rows.weights).dtype)
