"""Memory that the ranks of a group write into each other's: words and rows, as codegen/kernels/peer.cuh reads them.

Every rank has the same: WORDS bytes of counters and signals, zeros at first, and SLOTS_USED slots for rows. It is
allocated once for a group, and no tensor of a graph lies in it.
"""

from __future__ import annotations

import functools
import json
import logging
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moecompile.runtime.sharded import process_group

log = logging.getLogger("moecompile")

RANKS, SLOTS, CHANNELS = 16, 8, 256
"""At most; of peer.cuh."""
TAKEN_AT = 128 + 2 * SLOTS * 2 * 4
"""Where in the words it is said what other ranks have read."""
WORDS = TAKEN_AT + SLOTS * RANKS * 8 + SLOTS * RANKS * CHANNELS * 8
SLOTS_USED = 4
"""An exchange has one from its start until its wait."""
CHANNELS_OF_AN_SM = 4
"""Warps of each multiprocessor that sends."""
SMS, MOST_SMS = 12, CHANNELS // CHANNELS_OF_AN_SM
"""Multiprocessors that send, if nobody says otherwise: they move rows of 2048 features as fast as NVLink takes them; of
7168, eight do (docs/perf.md)."""
ROWS, ROWS_AT_LEAST = 2.0, 4096
"""Rows that a rank's experts have room for, if nobody says otherwise: as a multiple of its assignments, and at least so
many."""
PATIENCE, MOST_PATIENCE = 300.0, float((1 << 31) // 1000)
"""Seconds that a rank waits for another, if nobody says otherwise; kernels count milliseconds in 32 bits."""


class GivenUpError(RuntimeError):
    """An exchange of tokens was given up; the message says who has waited for whom, or who has no room."""

    def __init__(self, failure: str) -> None:
        super().__init__(
            f"moecompile: an exchange of tokens was given up: {failure}. Its results are NaN on all ranks; so is what "
            "follows. Look why that was, and start again from a checkpoint."
        )


@dataclass(frozen=True, eq=False)
class PeerMemory:
    """What one rank knows of the memory.

    Attributes:
        own: this rank's, bytes.
        bases: (ranks,) int64 on the device: the address of each rank's, for this device.
        rank: among `ranks`.
        room: bytes of a slot.
        told: a word of the host's memory that the kernels write a failure to; nobody waits for a device to read it.
        readers: blocks that take rows out of the memory, at most; 0 for as many as the device runs at once.
        held: what keeps the mapping of the peers' memory alive.
        begun: of each slot whose exchange has been started and not yet waited for, what the wait needs.
    """

    own: Tensor
    bases: Tensor
    rank: int
    room: int
    told: Tensor
    readers: int = 0
    held: Any = field(default=None, repr=False)
    begun: dict[int, Any] = field(default_factory=dict, repr=False)

    @property
    def ranks(self) -> int:
        """Of the group."""
        return self.bases.shape[0]

    @functools.cached_property
    def side(self) -> torch.cuda.Stream:
        """Where this rank waits for others; its kernels are first where multiprocessors become free."""
        return torch.cuda.Stream(self.own.device, priority=-1)

    def rows(self, slot: int) -> Tensor:
        """This rank's room for rows in that slot, bytes."""
        return self.own[WORDS + slot * self.room :][: self.room]

    def failure(self) -> str:
        """Who gave up an exchange, waiting for whom, as far as it is known here; empty if nobody has."""
        return failure_of(int(self.told[0]), STEPS, self.ranks)


STEPS = (
    "until that rank has read the rows of the exchange before",
    "until that rank's tokens have come",
    "until that rank's results have come",
)
"""What a rank may wait for, as codegen/kernels/peer.cuh numbers it. Behind these: it has no room; it has left one."""
ROUGHLY = 128
"""What rows that it has no room for are counted in."""


def failure_of(told: int, steps: Sequence[str], ranks: int) -> str:
    """What a word says that kernels have written a failure to; empty if there is none.

    Args:
        told: as `failure_of` of codegen/kernels/waits.cuh makes it.
        steps: what a rank may wait for, as these kernels number it.
        ranks: of the group.
    """
    word = told & 0xFFFF_FFFF_FFFF_FFFF
    if not word:
        return ""
    rank, other, step, slot = (word & 0xFFFF) - 1, (word >> 16 & 0xFFFF) - 1, word >> 32 & 0xFF, word >> 40
    if step == len(steps):
        return too_many(rank, ROUGHLY * slot)
    which = f"{'combine' if slot % 2 else 'dispatch'} {slot // 2}"
    if step > len(steps):
        words = "something failed on it meanwhile, memory that was not there say; start the job anew"
        return f"rank {rank} of {ranks} has left {which} in its middle: {words}"
    return f"rank {rank} of {ranks} has waited too long for rank {other} ({which}, {steps[step]})"


def too_many(rank: int, met: int, rows: int | None = None) -> str:
    """What is said of a rank whose experts more assignments met than there is room for."""
    words = "" if rows is None else f", which have room for {rows}"
    return f"{met} assignments met experts of rank {rank}{words}: raise the option `ep_rows`, or balance the router"


def room_for(ranks: int, capacity: int, pitch: int) -> int:
    """Bytes of a slot for rows of `pitch` bytes, a multiple of 16, `capacity` of each rank.

    Raises:
        ValueError: the kernels have no room for so much.
    """
    room = -(-ranks * capacity * pitch // 128) * 128
    if not 1 <= ranks <= RANKS or pitch % 16 or capacity < 1 or room // 16 >= 1 << 31:
        raise ValueError(
            f"moecompile: an exchange among {ranks} ranks of {capacity} rows each, of {pitch} bytes: expected at most "
            f"{RANKS} ranks, a multiple of 16 bytes, and less than 32 GiB"
        )
    return room


def among_streams(ranks: int, room: int, device: int, readers: int = 0) -> list[PeerMemory]:
    """Memory of ranks that are all on one device, each of which launches on a stream of its own: to test kernels.

    Where kernels of several ranks are to run at once, `readers` has to leave room for all of them.
    """
    place = torch.device("cuda", device)
    every = [torch.zeros(WORDS + SLOTS_USED * room, dtype=torch.uint8, device=place) for _ in range(ranks)]
    bases = addresses_of([each.data_ptr() for each in every], place)
    return [PeerMemory(own, bases, rank, room, word_of_host(), readers, every) for rank, own in enumerate(every)]


def among_devices(group: str, room: int) -> PeerMemory:
    """Memory of a group whose ranks have a device each, with access to the others' (NVLink). All of them call it.

    Raises:
        RuntimeError: torch's symmetric memory does not work between these devices.
    """
    from torch.distributed import _symmetric_memory as symmetric

    found = process_group(group)
    device = torch.device("cuda", torch.cuda.current_device())
    own = symmetric.empty(WORDS + SLOTS_USED * room, dtype=torch.uint8, device=device)
    own.zero_()
    handle = symmetric.rendezvous(own, found)
    torch.cuda.synchronize(device)
    distributed.barrier(found)  # nobody writes before all have cleared theirs
    bases = addresses_of([int(address) for address in handle.buffer_ptrs], device)
    return PeerMemory(own, bases, found.rank(), room, word_of_host(), held=handle)


def reaches_peers(group: str, device: torch.device) -> bool:
    """Whether the ranks of a group, one of which has this device, may write into each other's memory."""
    if device.type != "cuda":
        return False
    known = _reaching.get(group)
    if known is None:
        found = process_group(group)
        known = _reaching[group] = found.size() == 1 or _is_one_host(found)
    return known


def _is_one_host(group: distributed.ProcessGroup) -> bool:
    """Whether all ranks of the group are on one host, with a device each, and these see each other.

    Ranks tell each other through the job's key-value store: example values may be looked at meanwhile, among which
    no collective works.
    """
    devices, members = range(torch.cuda.device_count()), distributed.get_process_group_ranks(group)
    sees = all(torch.cuda.can_device_access_peer(one, other) for one in devices for other in devices if one != other)
    store, topic = distributed.distributed_c10d._get_default_store(), f"moecompile/peers/{group.group_name}/{members}"
    note = json.dumps([socket.gethostname(), torch.cuda.current_device(), sees])
    store.set(f"{topic}/{distributed.get_rank()}", note)
    notes = [json.loads(store.get(f"{topic}/{rank}")) for rank in members]
    places = {(host, device) for host, device, _ in notes}
    return len({host for host, _ in places}) == 1 and len(places) == len(members) and all(each[2] for each in notes)


_reaching: dict[str, bool] = {}
_memories: dict[str, PeerMemory] = {}
_outgrown: list[PeerMemory] = []
"""What captured graphs may still refer to."""
_given_up: list[str] = []
"""Why exchanges were given up that no kernel carried."""


def give_up(why: str) -> None:
    """No step of an optimizer goes on."""
    log.error("moecompile: an exchange of tokens was given up: %s", why)
    _given_up.append(why)
    _watch_optimizers()


def memory_of(group: str, room: int) -> PeerMemory:
    """The group's memory, with that much room at least; made when it is first asked for, by all ranks alike.

    Raises:
        RuntimeError: it is known here that an exchange in it was given up. Nobody waits for a device to know it.
    """
    found = _memories.get(group)
    if found is not None and found.told.item():
        raise GivenUpError(found.failure())
    if found is None or found.room < room:
        if found is not None:
            _outgrown.append(found)
        found = _memories[group] = _made_apart(group, room)
        _watch_optimizers()
    return found


def _made_apart(group: str, room: int) -> PeerMemory:
    """Memory that another thread makes on this one's device.

    Where Inductor warms up for CUDA graphs, all memory that this thread asks for comes from a pool of theirs, and what
    lives on in there is an error.
    """
    device = torch.cuda.current_device()

    def make() -> PeerMemory:
        with torch.cuda.device(device):
            return among_devices(group, room)

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()


@functools.cache
def _watch_optimizers() -> None:
    """No step of any of torch's optimizers goes on with what an exchange that failed has left."""
    register_optimizer_step_pre_hook(_refuse)


def _refuse(*_: Any) -> None:
    failures = [memory.failure() for memory in (*_memories.values(), *_outgrown)]
    for failure in (*failures, *_given_up):
        if failure:
            raise GivenUpError(failure)


def word_of_host() -> Tensor:
    """Zero, of the host's memory, which devices write to."""
    return torch.zeros(1, dtype=torch.int64, pin_memory=True)


def addresses_of(addresses: Sequence[int], device: torch.device) -> Tensor:
    """Addresses, (.,) int64 on that device."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)
