"""Memory that the ranks of a group write into each other's: words and rows, as codegen/kernels/peer.cuh reads them.

Every rank has the same: WORDS bytes of counters and signals, zeros at first, and SLOTS_USED slots of `capacity` rows
for each rank. It is allocated once for a group, and no tensor of a graph lies in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

RANKS, SLOTS, CHANNELS = 16, 8, 256
"""At most; of peer.cuh."""
WORDS = 128 + 2 * SLOTS * 2 * 4 + SLOTS * RANKS * 8 + SLOTS * RANKS * CHANNELS * 8
DISPATCH, COMBINE = 0, 1
"""Slots: an exchange has one from its start until its wait, and those of one kind follow each other."""
SLOTS_USED = 2
PATIENCE = 300.0
"""Seconds that a rank waits for another."""


@dataclass(frozen=True, eq=False)
class PeerMemory:
    """What one rank knows of the memory.

    Attributes:
        own: this rank's, bytes.
        bases: (ranks,) int64 on the device: the address of each rank's, for this device.
        rank: among `ranks`.
        capacity: rows of each rank in a slot.
        pitch: bytes of a row with what travels behind it, at most; a multiple of 16.
        channels: warps that send, the same number on all ranks.
        patience: seconds that a rank waits for another.
        held: what keeps the mapping of the peers' memory alive.
    """

    own: Tensor
    bases: Tensor
    rank: int
    capacity: int
    pitch: int
    channels: int
    patience: float = PATIENCE
    held: Any = field(default=None, repr=False)

    @property
    def ranks(self) -> int:
        """Of the group."""
        return self.bases.shape[0]

    def aborted_by(self) -> int | None:
        """The rank that gave an exchange up first; None if none has. Waits for the device."""
        word = int(self.own[:8].view(torch.int64)[0])
        return word - 1 if word else None


def bytes_for(ranks: int, capacity: int, pitch: int) -> int:
    """Of one rank's memory."""
    return WORDS + SLOTS_USED * ranks * capacity * pitch


def check_sizes(ranks: int, capacity: int, pitch: int, channels: int) -> None:
    """Raises ValueError for what the kernels have no room for."""
    for name, value, most in (("ranks", ranks, RANKS), ("channels", channels, CHANNELS)):
        if not 1 <= value <= most:
            raise ValueError(f"moecompile: {name} of an exchange: expected 1 to {most}, got {value}")
    if pitch % 16 or pitch < 16 or capacity < 1:
        raise ValueError(
            f"moecompile: an exchange of {capacity} rows of {pitch} bytes: expected one or more, of a multiple of 16"
        )


def among_streams(
    ranks: int, capacity: int, pitch: int, channels: int, patience: float, device: int
) -> list[PeerMemory]:
    """Memory of ranks that are all on one device, each of which launches on a stream of its own: to test kernels."""
    check_sizes(ranks, capacity, pitch, channels)
    place = torch.device("cuda", device)
    every = [torch.zeros(bytes_for(ranks, capacity, pitch), dtype=torch.uint8, device=place) for _ in range(ranks)]
    bases = _addresses([each.data_ptr() for each in every], place)
    return [PeerMemory(own, bases, rank, capacity, pitch, channels, patience, every) for rank, own in enumerate(every)]


def among_devices(group: str, capacity: int, pitch: int, channels: int, patience: float) -> PeerMemory:
    """Memory of a group whose ranks have a device each, with access to the others' (NVLink); all have to call it.

    Raises:
        ValueError: sizes that the kernels have no room for.
        RuntimeError: torch's symmetric memory does not work between these devices.
    """
    from torch.distributed import _symmetric_memory as symmetric

    from moecompile.runtime.sharded import process_group

    found = process_group(group)
    check_sizes(found.size(), capacity, pitch, channels)
    device = torch.device("cuda", torch.cuda.current_device())
    own = symmetric.empty(bytes_for(found.size(), capacity, pitch), dtype=torch.uint8, device=device)
    own.zero_()
    handle = symmetric.rendezvous(own, found)
    torch.cuda.synchronize(device)
    handle.barrier()  # nobody writes before all have cleared theirs
    bases = _addresses([int(address) for address in handle.buffer_ptrs], device)
    return PeerMemory(own, bases, found.rank(), capacity, pitch, channels, patience, handle)


def _addresses(addresses: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)
