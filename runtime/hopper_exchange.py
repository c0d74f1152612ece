"""The token exchange on Hopper GPUs that write into each other's memory: codegen/kernels/exchange_*.cuh, launched.

`moecompile.runtime.exchange` says what each of them computes. Nothing here waits for a device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moecompile.codegen.exchanges import (
    ExchangeGate,
    ExchangeHome,
    ExchangeHomeOfExperts,
    ExchangePlan,
    ExchangeReceive,
    ExchangeSend,
)
from moecompile.runtime.elementwise import dtype_name
from moecompile.runtime.hopper_routing import conformed
from moecompile.runtime.launch import Kernel, Launch, Value, load
from moecompile.runtime.peer_memory import CHANNELS_OF_AN_SM, PATIENCE, RANKS, SMS, PeerMemory, room_for

RING = 54 * 1024
"""Bytes of shared memory that a channel has for rows on their way; two at least have to fit."""
READERS = 4
"""Blocks of each multiprocessor that take rows out of the memory, at most: what they read is in this device's own."""
LANES = 32
"""Experts of a token, at most: a lane sees to each."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def serves(device: torch.device) -> bool:
    """Whether the kernels run on that device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def pitch_of(columns: int, dtype: torch.dtype, ids: Tensor | None, weights: Tensor | None) -> int:
    """Bytes of a row with its experts and their weights behind it."""
    row = columns * dtype.itemsize
    for each, item in ((ids, 4), (weights, 0 if weights is None else weights.element_size())):
        row += 0 if each is None else each.shape[1] * item
    return -(-row // 16) * 16


def takes(x: Tensor, ids: Tensor | None, weights: Tensor | None, ranks: int) -> bool:
    """Whether the kernels exchange rows like x's, with these behind them."""
    along = [each for each in (ids, weights) if each is not None]
    if x.dtype not in DTYPES or x.shape[1] % 8 or ranks > RANKS or any(each.shape[1] > LANES for each in along):
        return False
    return (weights is None or weights.dtype in DTYPES) and fits(pitch_of(x.shape[1], x.dtype, ids, weights))


def fits(pitch: int) -> bool:
    """Whether a channel has room for rows of so many bytes."""
    return 2 * pitch <= RING


def plan(expert_ids: Tensor, num_experts: int, ranks: int, capacity: int) -> tuple[Tensor, Tensor]:
    """`sent` and `home` of `moecompile::exchange_plan`.

    Args:
        expert_ids: (T, K) of any integer dtype; -1 for none. Another id without an expert is a device-side assertion.
        num_experts: of all ranks, a multiple of their number.
        ranks: at most RANKS.
        capacity: T or more.
    """
    ids = conformed(expert_ids)
    kernel = load(ExchangePlan(dtype_name(ids.dtype)), ids.device.index)
    tokens, top_k = ids.shape
    sent = ids.new_empty(ranks * capacity, dtype=torch.int32)
    home = ids.new_empty((tokens, ranks), dtype=torch.int32)
    blocks = max(1, -(-tokens // kernel.threads))
    Launch(kernel, blocks, (ids, sent, home, tokens, top_k, num_experts // ranks, ranks, capacity)).run()
    return sent, home


@dataclass(frozen=True)
class Rows:
    """What ranks exchange: rows, and what belongs to the experts of each.

    Attributes:
        values: (N, H), lines that begin at multiples of 16 bytes.
        ids: (N, K) of a dtype in IDS, contiguous; None if none travel.
        weights: (N, K) contiguous; None likewise.
    """

    values: Tensor
    ids: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, ids: Tensor | None, weights: Tensor | None) -> Rows:
        """The same as the kernels read them, copied where need be."""
        lines = values.stride(1) == 1 and values.stride(0) * values.element_size() % 16 == 0
        lines = lines and values.data_ptr() % 16 == 0
        return cls(
            values if lines else values.clone(memory_format=torch.contiguous_format),
            None if ids is None else conformed(ids),
            None if weights is None else weights.contiguous(),
        )

    def room(self, rows: int) -> Rows:
        """For so many of them: ids in 32 bits."""
        return Rows(
            self.values.new_empty((rows, self.values.shape[1])),
            None if self.ids is None else self.ids.new_empty((rows, self.ids.shape[1]), dtype=torch.int32),
            None if self.weights is None else self.weights.new_empty((rows, self.weights.shape[1])),
        )

    @property
    def pitch(self) -> int:
        """Bytes of one, with what travels behind it."""
        return pitch_of(self.values.shape[1], self.values.dtype, self.ids, self.weights)

    @property
    def row_bytes(self) -> int:
        """Of one without that."""
        return self.values.shape[1] * self.values.element_size()

    @property
    def line_bytes(self) -> int:
        """From one to the next."""
        return self.values.stride(0) * self.values.element_size()

    @property
    def top_k(self) -> int:
        """Experts of each; 0 if nothing travels behind it."""
        return next((each.shape[1] for each in (self.ids, self.weights) if each is not None), 0)

    @property
    def weight_bytes(self) -> int:
        """Of one weight; 0 if none travel."""
        return 0 if self.weights is None else self.weights.element_size()

    @property
    def id_type(self) -> str:
        """The ids' dtype, or any of IDS if none travel."""
        return "int64" if self.ids is None else dtype_name(self.ids.dtype)


@dataclass(frozen=True)
class OwnParts:
    """Where the rows of this rank's own assignments to experts of its own are, which are in one of two parts.

    Attributes:
        ids: (T, K), of all ranks' experts.
        slots: (T, K) of a plan of these alone, of which the one part has of each expert the first so many times
            `multiple`.
        offsets: (E,) of that plan.
        others: slots (ranks * capacity, K) of the other part.
        first: where rows of the other begin.
        multiple: as said.
    """

    ids: Tensor
    slots: Tensor
    offsets: Tensor
    others: Tensor
    first: int
    multiple: int


@dataclass(frozen=True)
class Exchange:
    """One exchange of a rank.

    Attributes:
        memory: of this rank.
        slot: of the memory.
        capacity: rows of each rank at most.
        sms: multiprocessors that send, the same number on all ranks.
        patience: seconds that a rank waits for another.
    """

    memory: PeerMemory
    slot: int
    capacity: int
    sms: int = SMS
    patience: float = PATIENCE

    def peers(self, pitch: int) -> tuple[Value, ...]:
        """`Peers` of peer.cuh, for rows of `pitch` bytes."""
        memory = self.memory
        if room_for(memory.ranks, self.capacity, pitch) > memory.room:
            raise ValueError(
                f"moecompile: an exchange of {self.capacity} rows a rank, of {pitch} bytes, in {memory.room} bytes"
            )
        milliseconds = max(1, round(self.patience * 1000))
        where = (memory.rank, memory.ranks, self.slot, memory.room // 16, self.capacity, pitch)
        return (memory.bases, memory.told, *where, self.sms * CHANNELS_OF_AN_SM, milliseconds)

    def records(self, pitch: int) -> Tensor:
        """What has come from all ranks and stays where it is: (ranks * capacity, pitch) bytes."""
        memory, rows = self.memory, self.memory.ranks * self.capacity
        return memory.rows(self.slot)[: rows * pitch].view(rows, pitch)

    def readers(self, kernel: Kernel, rows: int) -> int:
        """Blocks that read so many rows, each of whose warps reads one at a time."""
        each = kernel.threads // 32
        return max(1, min(-(-rows // each), self.memory.readers or READERS * kernel.multiprocessors))


def send(
    exchange: Exchange, rows: Rows, sent: Tensor | None, came: Tensor | None, *, read: int = -1,
    started: Tensor | None = None, early: bool = True,
) -> None:  # fmt: skip
    """Writes rows into the memory of the other ranks that are to have them, and says so.

    Args:
        exchange: of this rank.
        rows: N = T, or ranks * capacity where `sent` is None.
        sent: of `plan`, or None: the first `came` of each rank's rows go back to it.
        came: (ranks,) int32.
        read: the slot of another exchange whose rows `take` has left where they were, and nobody reads any more.
        started: one int32, zero at first: how many blocks have begun.
        early: of the launch.

    Raises:
        ValueError: rows are longer than a channel has room for.
    """
    if not fits(rows.pitch):
        raise ValueError(f"moecompile: rows of {rows.pitch} bytes: expected {RING // 2} or less")
    kernel = load(ExchangeSend(rows.id_type), rows.values.device.index)
    values = (
        *exchange.peers(rows.pitch), rows.values, sent, came, rows.ids, rows.weights, rows.row_bytes, rows.line_bytes,
        rows.top_k, rows.weight_bytes, read, started,
    )  # fmt: skip
    Launch(kernel, exchange.sms, values, early).run()


def await_start(exchange: Exchange, started: Tensor) -> None:
    """What is launched behind this begins when all blocks of a `send` have: they would find no room after it."""
    Launch(load(ExchangeGate(), started.device.index), 1, (started, exchange.sms)).run()


def receive(
    exchange: Exchange, rows: Rows, sent: Tensor, into: Rows, came: Tensor, experts: int, slots: Tensor | None = None
) -> None:
    """Puts what came, and this rank's own rows, where they are to be, and their experts, counted from its first.

    Args:
        exchange: of this rank.
        rows: what this rank sends.
        sent: of `plan`.
        into: room for ranks * capacity of them, allocated before they were sent: the kernel begins early.
        came: (ranks,) int32, likewise; how many rows came from each.
        experts: of each rank.
        slots: (ranks * capacity, K) int32, contiguous: where rows go that have no experts with them, each to all of its
            own, -1 for none. Then `into` has room for the rows of experts. None: to their places.
    """
    spread = 0 if slots is None else slots.shape[1]
    kernel = load(ExchangeReceive(rows.id_type), rows.values.device.index)
    values = (
        *exchange.peers(rows.pitch), rows.values, sent, rows.ids, rows.weights, into.values, into.ids, into.weights,
        came, None, None, 0, slots, spread, rows.line_bytes, rows.row_bytes // 16, rows.top_k, rows.weight_bytes,
        experts,
    )  # fmt: skip
    Launch(kernel, exchange.readers(kernel, exchange.capacity), values).run()


def take(
    exchange: Exchange, rows: Rows, sent: Tensor, into: tuple[Tensor, Tensor | None], came: Tensor,
    own: tuple[Tensor, Tensor], multiple: int,
) -> None:  # fmt: skip
    """Waits for what came, and puts all but the rows where it is to be: these stay in the memory (`Exchange.records`).

    It does not begin before the kernels before it have ended, and has few blocks: where it waits for other ranks, it
    keeps multiprocessors from what this rank could do meanwhile.

    Args:
        exchange: of this rank.
        rows: what this rank sends, with ids.
        sent: of `plan`.
        into: room for ids and weights of ranks * capacity rows.
        came: (ranks,) int32; how many rows came from each.
        own: offsets (E,) and slots (T, K) of a plan of this rank's own assignments to experts of its own.
        multiple: of each expert's rows there the first so many times that many are left out: they have no expert here.
    """
    kernel, (offsets, slots) = load(ExchangeReceive(rows.id_type, stay=True), rows.values.device.index), own
    values = (
        *exchange.peers(rows.pitch), rows.values, sent, rows.ids, rows.weights, None, *into, came, slots, offsets,
        multiple, None, 0, rows.line_bytes, rows.row_bytes // 16, rows.top_k, rows.weight_bytes, offsets.shape[0],
    )  # fmt: skip
    blocks = min(exchange.readers(kernel, exchange.capacity), READERS * exchange.sms)
    Launch(kernel, blocks, values, early=False).run()


def home(exchange: Exchange, places: Tensor, rows: Rows, into: Rows, anyway: bool = False) -> None:
    """Sums what came back for each token, and what travelled with it.

    Args:
        exchange: of this rank.
        places: `home` of `plan`, (T, ranks).
        rows: what this rank sends, contiguous.
        into: room for T of them, allocated before they were sent: the kernel begins early.
        anyway: of the launch.
    """
    dtypes = [dtype_name(each.dtype) for each in (rows.values, rows.values if rows.weights is None else rows.weights)]
    kernel = load(ExchangeHome(*dtypes), rows.values.device.index)
    tokens, columns = into.values.shape
    values = (
        *exchange.peers(rows.pitch), places, rows.values, columns, 0, rows.weights, into.values, into.weights, tokens,
        columns, rows.top_k,
    )  # fmt: skip
    Launch(kernel, exchange.readers(kernel, tokens), values, anyway=anyway).run()


def home_of_experts(
    exchange: Exchange, places: Tensor, parts: OwnParts, rows: Tensor, weights: Tensor | None, output: str, into: Tensor
) -> None:
    """Sums what came back for each token, and this rank's own part: its rows of experts, summed and rounded once.

    Args:
        exchange: of this rank.
        places: `home` of `plan`, (T, ranks).
        parts: where its rows are.
        rows: (rows of both parts, H), bfloat16 or float16, contiguous.
        weights: (T, K) float32, contiguous, or None.
        output: an expression of `out` and `weight`.
        into: (T, H), written, of the dtype of what came back.
    """
    ids = conformed(parts.ids)
    names = dtype_name(rows.dtype), dtype_name(into.dtype), output, dtype_name(ids.dtype)
    kernel = load(ExchangeHomeOfExperts(*names), into.device.index)
    (tokens, columns), (experts,), top_k = into.shape, parts.offsets.shape, ids.shape[1]
    values = (
        *exchange.peers(columns * into.element_size()), places, ids, parts.slots, parts.offsets, parts.others, top_k,
        experts, parts.first, parts.multiple, rows, weights, columns, 0, None, into, None, tokens, columns, 0,
    )  # fmt: skip
    Launch(kernel, exchange.readers(kernel, tokens), values).run()
